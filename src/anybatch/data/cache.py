"""A cache of rows in files, made once from data that do not fit in memory.

    CACHE/NAME/rows.bin         input after input, in the dtype of the data
               beside.npz       targets, weights, and the CRC-32 of each row of inputs
               manifest.json    sealed JSON of dtype, shape, sizes and data files

NAME is a hash of the files and columns that it was made from. A cache is complete or absent: it is
written and flushed as NAME.partial, and renamed at the end. It is made again if the size or time of
one of its data files changes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.stored import Stored, StoredRows, compute_checksums, make_damage_error
from anybatch.errors import DataError
from anybatch.runs.checksums import seal, unseal
from anybatch.runs.disk import flush_file, make_folder, open_file, replace_file, sync_folder

__all__ = ["open_cache"]

FORMAT = 2
ROWS, OTHERS, MANIFEST = "rows.bin", "beside.npz", "manifest.json"

Piece = Mapping[str, NDArray[Any]]


def open_cache(
    folder: Path,
    *,
    files: Sequence[Path],
    request: Mapping[str, Any],
    read_pieces: Callable[[], Iterable[Piece]],
) -> Stored:
    """Open the cache of some data files; make it if there is none, or if the files have changed.

    Args:
        folder: of all caches; made if missing.
        request: the columns in the cache, as JSON can hold it.
        read_pieces: yields arrays "inputs", "targets", and "weights" if there are any, of
            consecutive examples. Memory holds one piece at a time.

    Raises:
        DataError: examples that `Examples.from_arrays` refuses; a cache that is damaged.
    """
    from fcntl import LOCK_EX, flock  # exists on Unix only

    files = [file.resolve() for file in files]
    states = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    source = {"format": FORMAT, "files": [str(file) for file in files], **request}
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    place = folder / name
    if not _is_current(place, states):
        make_folder(folder)
        with open_file(folder / f".{name}.lock", "ab") as lock:  # a link is refused
            flock(lock, LOCK_EX)  # a second process waits here, and then finds the cache
            if not _is_current(place, states):
                _write(place, read_pieces(), {"source": source, "states": states})
    return _open(place)


def _is_current(place: Path, states: list[list[int]]) -> bool:
    return place.is_dir() and bool(_read_manifest(place)["states"] == states)


def _write(place: Path, pieces: Iterable[Piece], origin: dict[str, Any]) -> None:
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process that was killed
    if place.exists():  # made from files that have changed
        place.rename(partial)
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        with (partial / ROWS).open("wb") as file:
            manifest, others = _write_rows(file, pieces)
            flush_file(file)
        _check_others(others)  # before they are written
        with (partial / OTHERS).open("w+b") as file:
            np.savez(file, **others)
            flush_file(file)
            file.seek(0)
            manifest["others_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        manifest["sizes"] = {name: (partial / name).stat().st_size for name in (ROWS, OTHERS)}
        replace_file(partial / MANIFEST, [seal({**origin, **manifest})])
        partial.rename(place)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_rows(file: Any, pieces: Iterable[Piece]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the inputs; return their dtype and shape, and the checksums, targets and weights."""
    row, kind, largest, count = (), np.dtype(np.uint8), 0.0, 0
    others: list[dict[str, Any]] = []
    for piece in pieces:
        inputs = np.ascontiguousarray(piece["inputs"])
        row, kind = inputs.shape[1:], inputs.dtype
        if not inputs.size:
            raise DataError("The inputs are empty. Each example must hold at least one number.")
        piece_largest = float(max(abs(float(inputs.max())), abs(float(inputs.min()))))
        if not np.isfinite(piece_largest):
            bad = np.argwhere(~np.isfinite(inputs))[0]
            raise DataError(
                f"inputs hold {inputs[tuple(bad)]} in example {count + bad[0]}. All must be "
                f"finite. Correct or drop it."
            )
        largest, count = max(largest, piece_largest), count + len(inputs)
        content = inputs.reshape(-1).view(np.uint8)
        file.write(content)
        others.append({**piece, "inputs": compute_checksums(content, inputs[0].nbytes)})
    if not count:
        raise DataError("The data set is empty. It must hold at least one example.")
    arrays = {name: np.concatenate([other[name] for other in others]) for name in others[0]}
    return {"dtype": kind.str, "row": list(row), "largest": largest}, arrays


def _check_others(arrays: Mapping[str, Any]) -> Examples:
    """Return targets and weights as tensors; refuse what `Examples.from_arrays` refuses."""
    empty = np.empty((len(arrays["targets"]), 0), np.float32)
    return Examples.from_arrays(empty, arrays["targets"], arrays.get("weights"))


def _open(place: Path) -> Stored:
    manifest = _read_manifest(place)
    for name, size in manifest["sizes"].items():
        actual = (place / name).stat().st_size if (place / name).is_file() else 0
        if actual != size:
            raise make_damage_error(place / name, f"has {actual} of {size} bytes")
    with (place / OTHERS).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest["others_sha256"]:
            raise make_damage_error(place / OTHERS, "has changed")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            others = dict(archive)
    kind = np.dtype(manifest["dtype"])
    rows = StoredRows(
        path=place / ROWS,
        kind=kind,
        row=tuple(manifest["row"]),
        largest=manifest["largest"],
        checksums=others["inputs"],
        dtype=torch.float64 if kind == np.float64 else torch.float32,
    )
    _, targets, weights = _check_others(others)
    return Stored(rows, targets, weights)


def _read_manifest(place: Path) -> dict[str, Any]:
    file = place / MANIFEST
    content = file.read_bytes() if file.is_file() else b""
    if (manifest := unseal(content)) is None:
        raise make_damage_error(file, f"of {len(content)} bytes has changed")
    return manifest
