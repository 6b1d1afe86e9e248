"""Examples whose inputs stay in a file, because they do not fit in memory.

    row i has the bytes  i S .. (i + 1) S - 1,    S bytes a row

Rows are read by position, a batch at a time. Each is checked against its CRC-32, which memory
holds. The file is not memory-mapped: pages of a map count as memory of the process, and a damaged
disk would end it. `anybatch.data.cache` writes such files.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.data.arrays import Examples
from anybatch.errors import DataError

__all__ = ["ConcatenatedRows", "Stored", "StoredRows", "compute_checksums", "make_damage_error"]

MAX_ROWS = 128  # in one system call, which takes at most 2 GB and 1,024 buffers


@final
@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """One column [N, ...] in a file, read by row: see `anybatch.examples.Rows`."""

    path: Path
    kind: np.dtype[Any]  # of a number in the file
    row: tuple[int, ...]  # shape of a row
    largest: float  # of all |numbers| in the file
    checksums: NDArray[np.uint32] = field(repr=False)  # of each row in the file
    dtype: torch.dtype  # of a number in memory
    ids: Tensor | None = field(default=None, repr=False)  # rows of the column; None: all

    def __len__(self) -> int:
        return len(self.checksums if self.ids is None else self.ids)

    def rows(self, ids: Tensor) -> Tensor:
        """Read the rows of these ids [B]: [B, ...].

        Raises:
            DataError: the file is missing, cut off, or a row does not fit its checksum.
        """
        places = self._find_places(ids)
        content = np.empty(len(places) * self._row_bytes, np.uint8)
        try:
            _read(self.path, places, content.data, self._row_bytes)
        except OSError as error:
            raise make_damage_error(self.path, f"cannot be read ({error})") from error
        wrong = np.flatnonzero(
            compute_checksums(content, self._row_bytes) != self.checksums[places]
        )
        if len(wrong):
            raise make_damage_error(self.path, f"has changed in row {places[wrong[0]]}")
        numbers = content.view(self.kind).reshape(len(places), *self.row)
        return torch.from_numpy(numbers).to(self.dtype)

    def prefetch(self, ids: Tensor) -> None:
        """Let the disk fetch the rows that are read next, in the background."""
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            spans = _group_neighbours(self._find_places(ids))
            _prefetch(file.fileno(), spans, self._row_bytes)

    def select(self, ids: Tensor) -> "StoredRows":
        """Select the rows of these ids; nothing is read."""
        return replace(self, ids=ids if self.ids is None else self.ids[ids])

    def to(self, dtype: torch.dtype) -> "StoredRows":
        """Return the same rows, to be read as another dtype.

        Raises:
            DataError: a number is too large for it.
        """
        if self.largest > torch.finfo(dtype).max:
            raise DataError(
                f"inputs of {self.path} hold numbers up to {self.largest:g}. {dtype} cannot hold "
                f"them. Scale them, or set run.dtype = 'float64'."
            )
        return replace(self, dtype=dtype)

    @property
    def _row_bytes(self) -> int:
        return self.kind.itemsize * prod(self.row)

    def _find_places(self, ids: Tensor) -> NDArray[np.int64]:
        """Return the numbers of these rows in the file."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise IndexError(f"ids are {ids.tolist()}. They must be from 0 to {len(self) - 1}.")
        return (ids if self.ids is None else self.ids[ids]).numpy()


@final
@dataclass(frozen=True, slots=True, eq=False)
class ConcatenatedRows:
    """Rows of one file, then those of another of the same shape."""

    first: StoredRows
    second: StoredRows
    ids: Tensor | None = field(default=None, repr=False)  # rows of both; None: all

    def __len__(self) -> int:
        return len(self.first) + len(self.second) if self.ids is None else len(self.ids)

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a row."""
        return self.first.row

    @property
    def checksums(self) -> NDArray[np.uint32]:
        """CRC-32 of each row in the files."""
        return np.concatenate([self.first.checksums, self.second.checksums])

    def rows(self, ids: Tensor) -> Tensor:
        """Read the rows of these ids [B]: [B, ...]."""
        places, size = self._find_places(ids), len(self.first)
        rows = torch.empty(len(places), *self.row, dtype=self.first.dtype)
        in_first = places < size
        rows[in_first] = self.first.rows(places[in_first])
        rows[~in_first] = self.second.rows(places[~in_first] - size)
        return rows

    def prefetch(self, ids: Tensor) -> None:
        """Let the disk fetch the rows that are read next."""
        places, size = self._find_places(ids), len(self.first)
        self.first.prefetch(places[places < size])
        self.second.prefetch(places[places >= size] - size)

    def select(self, ids: Tensor) -> "ConcatenatedRows":
        """Select the rows of these ids; nothing is read."""
        return replace(self, ids=self._find_places(ids))

    def to(self, dtype: torch.dtype) -> "ConcatenatedRows":
        """Return the same rows, to be read as another dtype."""
        return replace(self, first=self.first.to(dtype), second=self.second.to(dtype))

    def _find_places(self, ids: Tensor) -> Tensor:
        return ids if self.ids is None else self.ids[ids]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """N examples whose inputs are in a file; targets and weights are in memory."""

    inputs: StoredRows | ConcatenatedRows  # [N, ...]
    targets: Tensor  # [N] of int64 classes, or [N, ...] of numbers
    weights: Tensor | None = None  # [N] of floats >= 0, the weight of each example; None: 1

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def columns(self) -> tuple[Tensor | StoredRows | ConcatenatedRows, ...]:
        """Data for `steps` and `evaluate`: (inputs, targets), and weights if there are any."""
        both = self.inputs, self.targets
        return both if self.weights is None else (*both, self.weights)

    @property
    def collate(self) -> None:
        """None: a batch is made by index."""

    def select(self, ids: Tensor) -> "Stored":
        """Select the examples of these ids; nothing is read."""
        weights = None if self.weights is None else self.weights[ids]
        return Stored(self.inputs.select(ids), self.targets[ids], weights)

    def to(self, dtype: torch.dtype) -> "Stored":
        """Cast all floats to another dtype, inputs when they are read.

        Raises:
            DataError: a value is too large for it.
        """
        empty = torch.empty(len(self), 0)
        _, targets, weights = Examples(empty, self.targets, self.weights).to(dtype)
        return Stored(self.inputs.to(dtype), targets, weights)


def compute_checksums(content: NDArray[np.uint8], row_bytes: int) -> NDArray[np.uint32]:
    """Compute the CRC-32 of each row."""
    view, starts = content.data, range(0, len(content), row_bytes)
    return np.array([zlib.crc32(view[start : start + row_bytes]) for start in starts], np.uint32)


def make_damage_error(file: Path, damage: str) -> DataError:
    """Make the error for a file of a cache that has changed since it was written."""
    return DataError(
        f"{file} {damage}. The cache is damaged, by the disk or by a write of another program. "
        f"Remove the folder {file.parent}: it is made again from the data."
    )


def _read(path: Path, rows: NDArray[np.int64], output: memoryview, row_bytes: int) -> None:
    """Read rows of a file into a buffer; neighbours in the file take one read."""
    spans = list(_group_neighbours(rows))
    with path.open("rb", buffering=0) as opened:
        file = opened.fileno()
        _prefetch(file, spans, row_bytes)
        for first, places in spans:
            buffers = [output[at * row_bytes : (at + 1) * row_bytes] for at in places]
            size = os.preadv(file, buffers, first * row_bytes)
            if size != len(places) * row_bytes:
                raise OSError(f"it ends in row {first + size // row_bytes}")


def _prefetch(file: int, spans: Iterable[tuple[int, list[int]]], row_bytes: int) -> None:
    """Ask the disk for rows without waiting: it fetches many in the time of one."""
    if hasattr(os, "posix_fadvise"):
        for first, places in spans:
            span = first * row_bytes, len(places) * row_bytes
            os.posix_fadvise(file, *span, os.POSIX_FADV_WILLNEED)


def _group_neighbours(rows: NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    """Group rows that are neighbours in the file: the first, and the place of each in `rows`."""
    order = np.argsort(rows, kind="stable")
    cuts = np.flatnonzero(np.diff(rows[order]) != 1) + 1
    places, ascending = order.tolist(), rows[order].tolist()
    for start, stop in pairwise([0, *cuts.tolist(), len(places)]):
        for at in range(start, stop, MAX_ROWS):
            yield ascending[at], places[at : min(at + MAX_ROWS, stop)]
