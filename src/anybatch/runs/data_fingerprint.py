"""Fingerprint of the data of a run, to notice when a run continues with other data.

| key | content |
|---|---|
| examples | their number |
| kinds | types and shapes of the first sampled example |
| contents | SHA-256 of each column in memory |
| sample | a short SHA-256 of each sampled example; None: reading one twice gives two results |
| parts | number of examples in each split, and a SHA-256 of their ids |
| files | size and time of the files: a hint for the message, never compared |

It does not depend on ranks, workers, caches or paths. The sample is keyed by the number of
examples, so the same examples are read each time.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from anybatch import pytree
from anybatch.errors import CheckpointError, RunError
from anybatch.examples import count_examples, is_column_tree, make_reader
from anybatch.limits import shorten
from anybatch.order import Order
from anybatch.randomness import preserve_generators
from anybatch.runs.digest import digest
from anybatch.workers import read_in_workers

__all__ = [
    "DATA",
    "RANKS_SHARE",
    "check_data",
    "compute_fingerprint",
    "describe_missing_fingerprint",
    "find_differences",
    "get_fingerprint",
    "parse_fingerprint",
]

DATA = "data_fingerprint"
"""Setting of a checkpoint that holds the fingerprint."""

RANKS_SHARE = ("examples", "contents", "parts")
"""Keys that ranks compare before they begin; files and the length of a sample may differ."""

SAMPLE_SIZE = 512  # maximum number of examples
DIGITS = 6  # hexadecimal digits per sampled example
SECONDS = 0.2  # time to read the sample; slow data have a shorter one
SLOW = 0.5  # seconds for one example; the values of slower data are not sampled
HASHED_BYTES = 2**27  # columns up to this size are hashed whole
SUMMED_BYTES = 2**31  # columns up to this size are summed by row, and the sums hashed
PIECE_BYTES = 2**26  # bytes of a column that are summed at once
MAX_FILES = 100  # files of a folder that are listed

_TYPES: dict[str, tuple[type, ...]] = {
    "examples": (int,),
    "kinds": (dict, type(None)),
    "contents": (dict,),
    "sample": (str, type(None)),
    "parts": (dict,),
    "files": (dict,),
}
"""Types of the entries of a fingerprint."""


def compute_fingerprint(
    data: Any,
    *,
    parts: Mapping[str, Tensor] | None = None,
    files: Iterable[str | Path] = (),
    workers: int = 0,
) -> dict[str, Any]:
    """Compute the fingerprint of data as `steps` takes them, as plain JSON.

    Global generators keep their states. An example that cannot be read ends the sample: training
    will report it.

    Args:
        data: see `batches`.
        parts: ids of each split.
        files: files or folders that the data were read from.
        workers: more than 0: read the examples of a data set in a worker process. Some data sets
            must not be opened in the process that starts the workers.
    """
    data = data.tensors if type(data) is TensorDataset else data
    size, is_tree = count_examples(data), is_column_tree(data)
    columns = data if is_tree else getattr(data, "all_columns", None)
    with preserve_generators(torch.device("cpu")):
        kinds, sample = _read_sample(data, size, 0 if is_tree else workers)
    return {
        "examples": size,
        "kinds": kinds,
        "contents": {} if columns is None else dict(_digest_columns(columns)),
        "sample": sample,
        "parts": {name: [len(ids), digest(ids)[:16]] for name, ids in (parts or {}).items()},
        "files": dict(_list_file_states(files)),
    }


def get_fingerprint(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fingerprint in the settings of a checkpoint; None in old runs."""
    return parse_fingerprint(settings.get(DATA), "the checkpoint")


def parse_fingerprint(value: Any, place: str) -> dict[str, Any] | None:
    """Return a fingerprint that was read from JSON; None if there is none.

    Args:
        value: the JSON value.
        place: names the file, for the message.
    """
    if not value:
        return None
    is_valid = isinstance(value, dict) and all(
        isinstance(value.get(name), types) for name, types in _TYPES.items()
    )
    if not is_valid or not all(map(_is_file_state, value["files"].values())):
        raise RunError(
            f"{place} holds a fingerprint of the data that anybatch does not write: "
            f"{shorten(value)}. It was changed after it was written. Restore it from a copy."
        )
    return dict(value)


def _is_file_state(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int and abs(number) < 2**63 for number in value)
    )


def describe_missing_fingerprint(folder: Path) -> str:
    """Say that the data cannot be compared."""
    return f"the checkpoint of {folder} has no fingerprint of its data, so they are not compared."


def check_data(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool
) -> list[str]:
    """Compare the data of a run with the present data.

    Args:
        accept: whether to continue with other data.

    Returns:
        The differences that were accepted.

    Raises:
        RunError: the data differ, and `accept` is False.
    """
    differences = find_differences(before, now)
    if differences and not accept:
        hints = [f"{hint}. " for hint in _describe_files(before["files"], now["files"])]
        raise RunError(
            f"{folder} was trained on other data than these: {'; '.join(differences)}. "
            f"{''.join(hints)}The run expects the same examples in the same order. Put the data "
            f"back, or accept these by --accept-data (under torchrun: of `anybatch resume`), in "
            f"Python Run(..., accept_data=True); a run that goes on with them says so in its "
            f"records."
        )
    return differences


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe where two fingerprints differ; files do not count."""
    if before["examples"] != now["examples"]:
        return [f"there are {now['examples']:,} examples, and there were {before['examples']:,}"]
    differences = []
    old, new = before["kinds"] or {}, now["kinds"] or {}
    if old and new:
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                kinds = new.get(name, "not there"), old.get(name, "not there")
                differences.append(f"{name} is {kinds[0]}, and it was {kinds[1]}")
    if differences:
        return differences
    differences += _compare_samples(before, now)
    old, new = before["contents"], now["contents"]
    if not differences:
        differences += [
            f"values of {name} differ" for name in old if new.get(name, old[name]) != old[name]
        ]
    for name in before["parts"]:
        if name in now["parts"] and before["parts"][name] != now["parts"][name]:
            differences.append(f"the {name.replace('_', '-')} split holds other examples")
    return differences


def _compare_samples(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before["sample"] is None or now["sample"] is None:
        return []
    old, new = _split_sample(before["sample"]), _split_sample(now["sample"])
    ids = _choose_ids(now["examples"])
    pairs = list(zip(ids, old, new, strict=False))  # slow reading makes one sample shorter
    wrong = sorted(i for i, left, right in pairs if left != right)
    if not wrong:
        return []
    if len(pairs) == now["examples"] and sorted(old) == sorted(new):
        return [f"the examples are in another order, from example {wrong[0]} on"]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    plural = "s" if len(wrong) > 1 else ""
    numbers = ", ".join(map(str, wrong[:3]))
    return [
        f"example{plural} {numbers}{more} of {len(pairs)} sampled differ{'' if plural else 's'}"
    ]


def _split_sample(sample: str) -> list[str]:
    return [sample[at : at + DIGITS] for at in range(0, len(sample), DIGITS)]


def _choose_ids(size: int) -> list[int]:
    """Choose all ids, or a keyed sample, in a keyed order, since reading may end early."""
    if not size:
        return []
    ids: list[int] = Order(size, batch_size=min(size, SAMPLE_SIZE), seed=0).indices(0).tolist()
    return ids


def _read_sample(data: Any, size: int, workers: int) -> tuple[dict[str, str] | None, str | None]:
    """Read the sample, here or in a worker: kinds of its first example, and digests of all."""
    if not workers:
        return _read_sample_here(data, size)
    read = read_in_workers(lambda _: _read_sample_here(data, size), [0], 1, seed=0, listed=False)
    try:
        sample: tuple[dict[str, str] | None, str | None] = next(read)
        return sample
    except Exception:  # training will start workers too, and report the error
        return None, None
    finally:
        read.close()


def _read_sample_here(data: Any, size: int) -> tuple[dict[str, str] | None, str | None]:
    read, is_tree = make_reader(data, raw=True), is_column_tree(data)
    kinds: dict[str, str] | None = None
    digests: list[str] = []
    in_memory = is_tree and all(isinstance(leaf, Tensor) for leaf in pytree.list_leaves(data))
    end = math.inf if in_memory else time.monotonic() + SECONDS
    for i in _choose_ids(size):
        start, ids = time.monotonic(), torch.tensor([i])
        try:
            example = read(ids)[0]
            if kinds is None:
                leaves = pytree.name_leaves(example, "example")
                kinds = {name: _describe_kind(leaf) for name, leaf in leaves}
            if time.monotonic() - start > SLOW:
                return kinds, None
            content = _digest_example(example)
            if not is_tree and _digest_example(read(ids)[0]) != content:
                return {name: kind.split(" of ")[0] for name, kind in kinds.items()}, None
        except Exception:  # the user's code may raise anything; training will report it
            break
        digests.append(content[:DIGITS])
        if time.monotonic() > end:
            break
    return kinds, "".join(digests)


def _describe_kind(leaf: Any) -> str:
    values = _get_array(leaf)
    if values is None:
        return type(leaf).__name__
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _get_array(leaf: Any) -> Tensor | np.ndarray | None:
    """Return the tensor or array of a leaf, or None; images of PIL become arrays."""
    if isinstance(leaf, Tensor):
        return leaf
    array = np.asarray(leaf) if hasattr(leaf, "__array_interface__") else None
    return None if array is None or array.dtype.hasobject else array


def _digest_example(example: Any) -> str:
    """Compute the SHA-256 of an example; objects that are no numbers or text count by type."""
    return digest([[name, _read_content(leaf)] for name, leaf in pytree.name_leaves(example, "")])


def _read_content(leaf: Any) -> Any:
    values = _get_array(leaf)
    if values is None:
        is_plain = leaf is None or type(leaf) in (bool, int, float, complex, str)
        return (
            leaf if is_plain else [type(leaf).__name__, leaf.hex() if type(leaf) is bytes else ""]
        )
    if isinstance(values, Tensor):
        return values.detach().to_dense() if values.layout != torch.strided else values.detach()
    return [str(values.dtype), values.shape, values.tobytes().hex()]


def _digest_columns(columns: Any) -> Iterator[tuple[str, str]]:
    """Yield name and SHA-256 of each column in memory that is not too large."""
    for name, column in pytree.name_leaves(columns, "data"):
        column = getattr(column, "checksums", column)  # a file of rows has a checksum for each row
        if isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
            column = _convert_to_tensor(column)
        if isinstance(column, Tensor) and column.nbytes <= SUMMED_BYTES:
            try:
                yield name, digest(column if column.nbytes <= HASHED_BYTES else _sum_rows(column))
            except CheckpointError:  # sparse or quantised: the sample must suffice
                continue


def _convert_to_tensor(array: np.ndarray) -> Tensor | None:
    try:
        return torch.from_numpy(pytree.to_native(array))
    except TypeError:  # text, dates, objects
        return None


def _sum_rows(column: Tensor) -> Tensor:
    """Sum the bits of each row as integers modulo 2^64, which shows any one changed number."""
    rows = max(1, PIECE_BYTES * len(column) // column.nbytes)
    kind = {1: torch.uint8, 2: torch.int16}.get(column.element_size(), torch.int32)
    pieces = [
        piece.detach().contiguous().flatten(1).view(kind).sum(1, dtype=torch.int64)
        if piece.ndim > 1
        else piece.detach().contiguous()
        for piece in torch.split(column, rows)
    ]
    return torch.cat(pieces)


def _list_file_states(paths: Iterable[str | Path]) -> Iterator[tuple[str, list[int]]]:
    """Yield absolute path, size and time of each file, also of those in folders."""
    for path in map(Path, paths):
        with suppress(OSError):
            files = sorted(path.iterdir())[:MAX_FILES] if path.is_dir() else [path]
            for file in filter(Path.is_file, files):
                state = file.stat()
                yield str(file.absolute()), [state.st_size, state.st_mtime_ns]


def _describe_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Describe files that may have caused a difference."""
    for path in sorted({*before} - {*now})[:3]:
        yield f"It read {path}, which is not read now"
    for path in sorted({*now} - {*before})[:3]:
        yield f"Now {path} is read"
    changed = [path for path in sorted(before) if now.get(path, before[path]) != before[path]]
    for path in changed[:3]:
        (size, time_now), (old_size, old_time) = now[path], before[path]
        yield (
            f"{path} has {size:,} bytes, written {_format_time(time_now)}; it had {old_size:,}, "
            f"written {_format_time(old_time)}"
        )


def _format_time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9).isoformat(" ", "seconds")
