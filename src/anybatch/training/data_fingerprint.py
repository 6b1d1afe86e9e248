"""A fingerprint of a run's data, to tell whether a run goes on with the data that it was begun on.

| key | content |
|---|---|
| examples | their number |
| kinds | types and shapes of the first sampled example |
| contents | SHA-256 of each column that is held in memory |
| sample | a short SHA-256 of each sampled example; None: reading one twice gives two examples |
| parts | number of examples in each split, and a SHA-256 of their ids |
| files | size and time of the files, a hint for the message that is never compared by itself |

Nothing in it depends on ranks, workers, caches or paths. The sample is keyed by the number of
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
from anybatch.limits import shorten
from anybatch.order import Order
from anybatch.randomness import preserve_generators
from anybatch.training.batches import is_column_tree, num_examples, reader
from anybatch.training.digest import digest
from anybatch.training.workers import in_workers

__all__ = [
    "DATA",
    "RANKS_SHARE",
    "check_data",
    "checked_fingerprint",
    "data_fingerprint",
    "data_of_settings",
    "file_states",
    "find_differences",
    "no_fingerprint",
]

DATA = "data_fingerprint"
"""The setting of a checkpoint that holds the fingerprint."""

RANKS_SHARE = ("examples", "contents", "parts")
"""What ranks compare before they begin; files and the length of a sample may differ."""

SAMPLED = 512  # examples, at most
DIGITS = 6  # hexadecimal, of each sampled example
SECONDS = 0.2  # that reading the sample may take; slow data have a shorter one
SLOW = 0.5  # seconds of one example; nothing is said about the values of such data
HASHED_BYTES = 2**27  # of a column, hashed whole
SUMMED_BYTES = 2**31  # of a column whose rows are summed, and the sums hashed
PIECE_BYTES = 2**26  # of a column that is looked at together
FILES = 100  # of a folder, that are listed

_KINDS: dict[str, tuple[type, ...]] = {
    "examples": (int,),
    "kinds": (dict, type(None)),
    "contents": (dict,),
    "sample": (str, type(None)),
    "parts": (dict,),
    "files": (dict,),
}
"""Types of the entries of a fingerprint."""


def data_fingerprint(
    data: Any,
    *,
    parts: Mapping[str, Tensor] | None = None,
    files: Iterable[str | Path] = (),
    workers: int = 0,
) -> dict[str, Any]:
    """Compute the fingerprint of data as `steps` takes them, as plain JSON.

    Global generators keep their states. An example that cannot be read ends the sample: training
    tells of it when it comes to it.

    Args:
        data: see `batches`.
        parts: ids of each split.
        files: what the data were read from, files or folders.
        workers: more than 0: examples of a data set are read in a worker process, since some
            data sets must not be opened in the process that starts the workers.
    """
    data = data.tensors if type(data) is TensorDataset else data
    size, is_tree = num_examples(data), is_column_tree(data)
    columns = data if is_tree else getattr(data, "whole_columns", None)
    with preserve_generators(torch.device("cpu")):
        kinds, sample = _read_sample(data, size, 0 if is_tree else workers)
    return {
        "examples": size,
        "kinds": kinds,
        "contents": {} if columns is None else dict(_contents(columns)),
        "sample": sample,
        "parts": {name: [len(ids), digest(ids)[:16]] for name, ids in (parts or {}).items()},
        "files": dict(file_states(files)),
    }


def data_of_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fingerprint that a checkpoint's settings hold; None: a run from before there were any.

    Raises:
        RunError: something else stands there.
    """
    return checked_fingerprint(settings.get(DATA), "the checkpoint")


def checked_fingerprint(value: Any, place: str) -> dict[str, Any] | None:
    """Return a fingerprint as it was read from JSON; None where there is none.

    Args:
        value: what was read.
        place: names the file, for the message.

    Raises:
        RunError: a value that `data_fingerprint` does not make.
    """
    if not value:
        return None
    is_sound = isinstance(value, dict) and all(
        isinstance(value.get(name), kinds) for name, kinds in _KINDS.items()
    )
    if not is_sound or not all(map(_is_file_state, value["files"].values())):
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


def no_fingerprint(folder: Path) -> str:
    """Say that nothing can be compared."""
    return f"the checkpoint of {folder} has no fingerprint of its data, so they are not compared."


def check_data(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, accept: bool
) -> list[str]:
    """Compare the data of a run with those that are here.

    Args:
        folder: of the run, for the message.
        before, now: fingerprints.
        accept: whether to go on with other data.

    Returns:
        The differences that were accepted.

    Raises:
        RunError: other data, and they are not accepted.
    """
    found = find_differences(before, now)
    if found and not accept:
        hints = [f"{hint}. " for hint in _changed_files(before["files"], now["files"])]
        raise RunError(
            f"{folder} was trained on other data than these: {'; '.join(found)}. {''.join(hints)}"
            f"The run expects the same examples in the same order. Put the data back, or accept "
            f"these by --accept-data, in Python Run(..., accept_data=True); a run that goes on "
            f"with them says so in its records."
        )
    return found


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List in words where two fingerprints differ; files alone are no difference."""
    if before["examples"] != now["examples"]:
        return [f"there are {now['examples']:,} examples, and there were {before['examples']:,}"]
    found = []
    old, new = before["kinds"] or {}, now["kinds"] or {}
    if old and new:
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                found.append(f"{name} is {_or_none(new, name)}, and it was {_or_none(old, name)}")
    if found:
        return found
    found += _sample_differences(before, now)
    old, new = before["contents"], now["contents"]
    if not found:
        found += [
            f"values of {name} differ" for name in old if new.get(name, old[name]) != old[name]
        ]
    for name in before["parts"]:
        if name in now["parts"] and before["parts"][name] != now["parts"][name]:
            found.append(f"the {name.replace('_', '-')} split holds other examples")
    return found


def _or_none(kinds: Mapping[str, str], name: str) -> str:
    return kinds.get(name, "not there")


def _sample_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before["sample"] is None or now["sample"] is None:
        return []
    old, new = _split(before["sample"]), _split(now["sample"])
    ids = _sample_ids(now["examples"])
    pairs = list(zip(ids, old, new, strict=False))  # the shorter one: reading may have been slow
    wrong = sorted(i for i, one, other in pairs if one != other)
    if not wrong:
        return []
    if len(pairs) == now["examples"] and sorted(old) == sorted(new):
        return [f"the examples are in another order, from example {wrong[0]} on"]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    plural = "s" if len(wrong) > 1 else ""
    named = ", ".join(map(str, wrong[:3]))
    return [f"example{plural} {named}{more} of {len(pairs)} sampled differ{'' if plural else 's'}"]


def _split(sample: str) -> list[str]:
    return [sample[at : at + DIGITS] for at in range(0, len(sample), DIGITS)]


def _sample_ids(size: int) -> list[int]:
    """All ids, or a keyed sample of them, in a keyed order: reading may end before the last."""
    if not size:
        return []
    ids: list[int] = Order(size, batch_size=min(size, SAMPLED), seed=0).indices(0).tolist()
    return ids


def _read_sample(data: Any, size: int, workers: int) -> tuple[dict[str, str] | None, str | None]:
    """Kinds of the first sampled example, and the digests of all."""
    if not workers:
        return _sample_of(data, size)
    read = in_workers(lambda _: _sample_of(data, size), [0], 1, seed=0, listed=False)
    try:
        found: tuple[dict[str, str] | None, str | None] = next(read)
        return found
    except Exception:  # training starts workers of its own, and tells
        return None, None
    finally:
        read.close()


def _sample_of(data: Any, size: int) -> tuple[dict[str, str] | None, str | None]:
    read, is_tree = reader(data, raw=True), is_column_tree(data)
    kinds: dict[str, str] | None = None
    digests: list[str] = []
    in_memory = is_tree and all(isinstance(leaf, Tensor) for leaf in pytree.list_leaves(data))
    end = math.inf if in_memory else time.monotonic() + SECONDS
    for i in _sample_ids(size):
        begun, one = time.monotonic(), torch.tensor([i])
        try:
            example = read(one)[0]
            kinds = _kinds(example) if kinds is None else kinds
            if time.monotonic() - begun > SLOW:
                return kinds, None
            found = _example_digest(example)
            if not is_tree and _example_digest(read(one)[0]) != found:
                return {name: kind.split(" of ")[0] for name, kind in kinds.items()}, None
        except Exception:  # the user's code may raise anything; training comes to it
            break
        digests.append(found[:DIGITS])
        if time.monotonic() > end:
            break
    return kinds, "".join(digests)


def _kinds(example: Any) -> dict[str, str]:
    return {name: _kind(leaf) for name, leaf in pytree.name_leaves(example, "example")}


def _kind(leaf: Any) -> str:
    values = _numbers(leaf)
    if values is None:
        return type(leaf).__name__
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _numbers(leaf: Any) -> Tensor | np.ndarray | None:
    """Tensor or array of a leaf; None: it is none. Images of PIL become arrays."""
    if isinstance(leaf, Tensor):
        return leaf
    array = np.asarray(leaf) if hasattr(leaf, "__array_interface__") else None
    return None if array is None or array.dtype.hasobject else array


def _example_digest(example: Any) -> str:
    """SHA-256 of an example's content; of objects that are no numbers and no text, their type."""
    return digest([[name, _content(leaf)] for name, leaf in pytree.name_leaves(example, "")])


def _content(leaf: Any) -> Any:
    values = _numbers(leaf)
    if values is None:
        is_plain = leaf is None or type(leaf) in (bool, int, float, complex, str)
        return (
            leaf if is_plain else [type(leaf).__name__, leaf.hex() if type(leaf) is bytes else ""]
        )
    if isinstance(values, Tensor):
        return values.detach().to_dense() if values.layout != torch.strided else values.detach()
    return [str(values.dtype), values.shape, values.tobytes().hex()]


def _contents(columns: Any) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of each column in memory that is not too large."""
    for name, column in pytree.name_leaves(columns, "data"):
        column = getattr(column, "checksums", column)  # rows in a file, which has one for each
        if isinstance(column, np.ndarray) and not isinstance(column, np.memmap):
            column = _as_tensor(column)
        if isinstance(column, Tensor) and column.nbytes <= SUMMED_BYTES:
            try:
                yield name, digest(column if column.nbytes <= HASHED_BYTES else _row_sums(column))
            except CheckpointError:  # sparse, quantised: the sample has to do
                continue


def _as_tensor(array: np.ndarray) -> Tensor | None:
    try:
        return torch.from_numpy(pytree.to_native(array))
    except TypeError:  # text, dates, objects
        return None


def _row_sums(column: Tensor) -> Tensor:
    """Sums of the bits of each row as integers, modulo 2^64: any one changed number shows."""
    rows = max(1, PIECE_BYTES * len(column) // column.nbytes)
    kind = {1: torch.uint8, 2: torch.int16}.get(column.element_size(), torch.int32)
    pieces = [
        piece.detach().contiguous().flatten(1).view(kind).sum(1, dtype=torch.int64)
        if piece.ndim > 1
        else piece.detach().contiguous()
        for piece in torch.split(column, rows)
    ]
    return torch.cat(pieces)


def file_states(paths: Iterable[str | Path]) -> Iterator[tuple[str, list[int]]]:
    """Absolute path, size and time of each file, those in folders included."""
    for path in map(Path, paths):
        with suppress(OSError):
            inside = sorted(path.iterdir())[:FILES] if path.is_dir() else [path]
            for file in filter(Path.is_file, inside):
                state = file.stat()
                yield str(file.absolute()), [state.st_size, state.st_mtime_ns]


def _changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say which files may be behind a difference."""
    for path in sorted({*before} - {*now})[:3]:
        yield f"It read {path}, which is not read now"
    for path in sorted({*now} - {*before})[:3]:
        yield f"Now {path} is read"
    changed = [path for path in sorted(before) if now.get(path, before[path]) != before[path]]
    for path in changed[:3]:
        (size, written), (old_size, old_written) = now[path], before[path]
        yield (
            f"{path} has {size:,} bytes, written {_date(written)}; it had {old_size:,}, written "
            f"{_date(old_written)}"
        )


def _date(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9).isoformat(" ", "seconds")
