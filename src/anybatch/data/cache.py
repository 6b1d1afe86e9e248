"""A cache of rows in files, made once from data that do not fit in memory.

    CACHE/NAME/rows.bin         input after input, in the dtype that it came in
               beside.npz       targets, weights, and the CRC-32 of each row of inputs
               manifest.json    dtype, shape, sizes, what it was made from; sealed with a SHA-256

NAME is a hash of which columns of which files were asked for. A cache appears whole or not at
all: written and flushed in NAME.partial, renamed at the end. It is made again where a file that
it was made from has another size or time.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.stored import Stored, StoredRows, checksums, damaged
from anybatch.errors import DataError
from anybatch.training.disk import make_folder, open_file, replace_file, sync_folder

__all__ = ["cached"]

FORMAT = 1
ROWS, BESIDE, MANIFEST = "rows.bin", "beside.npz", "manifest.json"

Piece = Mapping[str, NDArray[Any]]


def cached(
    folder: Path,
    *,
    made_from: Sequence[Path],
    asked: Mapping[str, Any],
    pieces: Callable[[], Iterable[Piece]],
) -> Stored:
    """Examples from a cache, which is made if there is none of these files as they are.

    Args:
        folder: where caches lie; made if missing.
        made_from: files.
        asked: what of them is kept, as JSON can hold it.
        pieces: makes arrays "inputs", "targets", and "weights" if there are any, of consecutive
            examples; held in memory one at a time.

    Raises:
        DataError: examples that `Examples.of` refuses; a cache that is damaged.
    """
    from fcntl import LOCK_EX, flock  # Unix alone has it

    files = [file.resolve() for file in made_from]
    states = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    source = {"format": FORMAT, "files": [str(file) for file in files], **asked}
    name = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
    place = folder / name
    if not _is_of(place, states):
        make_folder(folder)
        with open_file(folder / f".{name}.lock", "ab") as lock:  # a link is refused
            flock(lock, LOCK_EX)  # who comes second waits, and finds it made
            if not _is_of(place, states):
                _make(place, pieces(), {"source": source, "states": states})
    return _opened(place)


def _is_of(place: Path, states: list[list[int]]) -> bool:
    return place.is_dir() and bool(_manifest(place)["states"] == states)


def _make(place: Path, pieces: Iterable[Piece], origin: dict[str, Any]) -> None:
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier process that was cut off
    if place.exists():  # of other files
        place.rename(partial)
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        others: list[dict[str, Any]] = []
        with (partial / ROWS).open("wb") as file:
            about = _write_rows(file, pieces, others)
            _flush(file)
        beside: dict[str, Any] = {}
        for name in others[0]:
            beside[name] = np.concatenate([other[name] for other in others])
        _beside(beside)  # refuses what is no target and no weight, before anything is kept
        with (partial / BESIDE).open("w+b") as file:
            np.savez(file, **beside)
            _flush(file)
            file.seek(0)
            about["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        about["sizes"] = {name: (partial / name).stat().st_size for name in (ROWS, BESIDE)}
        replace_file(partial / MANIFEST, [_sealed({**origin, **about})])
        partial.rename(place)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_rows(file: Any, pieces: Iterable[Piece], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the inputs; put the rest of each piece into `others`, with checksums of its rows."""
    row, kind, largest, count = (), np.dtype(np.uint8), 0.0, 0
    for piece in pieces:
        inputs = np.ascontiguousarray(piece["inputs"])
        row, kind = inputs.shape[1:], inputs.dtype
        if not inputs.size:
            raise DataError("the inputs hold no numbers, expected at least one in each example.")
        most = float(max(abs(float(inputs.max())), abs(float(inputs.min()))))
        if not np.isfinite(most):
            bad = np.argwhere(~np.isfinite(inputs))[0]
            raise DataError(
                f"inputs hold {inputs[tuple(bad)]} in example {count + bad[0]}, expected finite "
                f"numbers. Mend or drop it."
            )
        largest, count = max(largest, most), count + len(inputs)
        content = inputs.reshape(-1).view(np.uint8)
        file.write(content)
        sums = checksums(content, inputs[0].nbytes)
        others.append({**piece, "inputs": sums})
    if not count:
        raise DataError("the data set is empty, expected at least one example.")
    return {"dtype": kind.str, "row": list(row), "largest": largest}


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _beside(arrays: Mapping[str, Any]) -> Examples:
    empty = np.empty((len(arrays["targets"]), 0), np.float32)
    return Examples.of(empty, arrays["targets"], arrays.get("weights"))


def _opened(place: Path) -> Stored:
    about = _manifest(place)
    for name, size in about["sizes"].items():
        found = (place / name).stat().st_size if (place / name).is_file() else "no file"
        if found != size:
            raise damaged(place / name, f"is of {found} bytes, expected {size}")
    with (place / BESIDE).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
            raise damaged(place / BESIDE, "is not what was written")
        file.seek(0)
        with np.load(file, allow_pickle=False) as opened:
            beside = dict(opened)
    kind = np.dtype(about["dtype"])
    rows = StoredRows(
        path=place / ROWS,
        kind=kind,
        row=tuple(about["row"]),
        largest=about["largest"],
        checksums=beside["inputs"],
        dtype=torch.float64 if kind == np.float64 else torch.float32,
    )
    _, targets, weights = _beside(beside)
    return Stored(rows, targets, weights)


def _sealed(about: dict[str, Any]) -> bytes:
    body = json.dumps(about, sort_keys=True)
    return json.dumps([about, hashlib.sha256(body.encode()).hexdigest()], indent=1).encode()


def _manifest(place: Path) -> dict[str, Any]:
    content = b""
    try:
        content = (place / MANIFEST).read_bytes()
        about: dict[str, Any] = json.loads(content)[0]
        if _sealed(about) == content:
            return about
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # refused below
    raise damaged(place / MANIFEST, f"of {len(content)} bytes is not what was written")
