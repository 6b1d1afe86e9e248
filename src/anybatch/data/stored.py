"""Examples whose inputs stay in a file, for those that do not fit in memory.

    row i lies at bytes  i S .. (i + 1) S - 1,    S bytes a row

Rows are read by position, a batch at a time, and checked: each has a CRC-32, kept in memory. They
are not mapped: pages of a map count as memory of the process, and damage would end it.
`anybatch.data.cache` writes such files.
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

__all__ = ["JoinedRows", "Stored", "StoredRows", "checksums", "damaged"]

MOST_ROWS = 128  # in one call of the system, which takes 2 GB and 1,024 buffers at most


@final
@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """One column [N, ...] in a file, read by row: see `anybatch.examples.Rows`."""

    path: Path
    kind: np.dtype[Any]  # of a number in the file
    row: tuple[int, ...]  # shape of a row
    largest: float  # of all |numbers| in the file
    checksums: NDArray[np.uint32] = field(repr=False)  # of each row in the file
    dtype: torch.dtype  # of a number once it is read
    ids: Tensor | None = field(default=None, repr=False)  # which rows are the column's; None: all

    def __len__(self) -> int:
        return len(self.checksums if self.ids is None else self.ids)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these ids [B], in their order: [B, ...].

        Raises:
            DataError: the file is gone, cut off, or a row is not what was written.
        """
        places = self._places(ids)
        content = np.empty(len(places) * self._row_bytes, np.uint8)
        try:
            _read(self.path, places, content.data, self._row_bytes)
        except OSError as error:
            raise damaged(self.path, f"cannot be read ({error})") from error
        wrong = np.flatnonzero(checksums(content, self._row_bytes) != self.checksums[places])
        if len(wrong):
            raise damaged(self.path, f"row {places[wrong[0]]} is not what was written")
        numbers = content.view(self.kind).reshape(len(places), *self.row)
        return torch.from_numpy(numbers).to(self.dtype)

    def soon(self, ids: Tensor) -> None:
        """Let the disk fetch what will be read next, while other work is done."""
        with suppress(OSError), self.path.open("rb", buffering=0) as opened:
            _fetch(opened.fileno(), _runs(self._places(ids)), self._row_bytes)

    def of_ids(self, ids: Tensor) -> "StoredRows":
        """The rows of these ids, in their order; nothing is read."""
        return replace(self, ids=ids if self.ids is None else self.ids[ids])

    def to(self, dtype: torch.dtype) -> "StoredRows":
        """The same rows, read as another dtype.

        Raises:
            DataError: a number that is too large for it.
        """
        if self.largest > torch.finfo(dtype).max:
            raise DataError(
                f"inputs of {self.path} hold numbers up to {self.largest:g}, expected values that "
                f"{dtype} can hold. Scale them, or set run.dtype = 'float64'."
            )
        return replace(self, dtype=dtype)

    @property
    def _row_bytes(self) -> int:
        return self.kind.itemsize * prod(self.row)

    def _places(self, ids: Tensor) -> NDArray[np.int64]:
        """Which rows of the file these are."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise IndexError(f"ids {ids.tolist()} of {len(self)} rows: expected 0 to N - 1.")
        return (ids if self.ids is None else self.ids[ids]).numpy()


@final
@dataclass(frozen=True, slots=True, eq=False)
class JoinedRows:
    """The rows of one file, then those of another of the same shape."""

    first: StoredRows
    second: StoredRows
    ids: Tensor | None = field(default=None, repr=False)  # which of both; None: all

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
        """The rows of these ids [B], in their order: [B, ...]."""
        places, size = self._places(ids), len(self.first)
        found = torch.empty(len(places), *self.row, dtype=self.first.dtype)
        early = places < size
        found[early] = self.first.rows(places[early])
        found[~early] = self.second.rows(places[~early] - size)
        return found

    def soon(self, ids: Tensor) -> None:
        """Let the disk fetch what will be read next."""
        places, size = self._places(ids), len(self.first)
        self.first.soon(places[places < size])
        self.second.soon(places[places >= size] - size)

    def of_ids(self, ids: Tensor) -> "JoinedRows":
        """The rows of these ids, in their order; nothing is read."""
        return replace(self, ids=self._places(ids))

    def to(self, dtype: torch.dtype) -> "JoinedRows":
        """The same rows, read as another dtype."""
        return replace(self, first=self.first.to(dtype), second=self.second.to(dtype))

    def _places(self, ids: Tensor) -> Tensor:
        return ids if self.ids is None else self.ids[ids]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """N examples whose inputs are in a file; targets and weights are in memory."""

    inputs: StoredRows | JoinedRows  # [N, ...]
    targets: Tensor  # [N] of int64 classes, or [N, ...] of numbers
    weights: Tensor | None = None  # [N] of floats >= 0, what each example counts; None: 1

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def columns(self) -> tuple[Tensor | StoredRows | JoinedRows, ...]:
        """What `steps` and `evaluate` take as data: (inputs, targets), or with the weights."""
        both = self.inputs, self.targets
        return both if self.weights is None else (*both, self.weights)

    @property
    def collate(self) -> None:
        """Rows are gathered by index."""

    def of_ids(self, ids: Tensor) -> "Stored":
        """The examples of these ids, in their order; nothing is read."""
        weights = None if self.weights is None else self.weights[ids]
        return Stored(self.inputs.of_ids(ids), self.targets[ids], weights)

    def to(self, dtype: torch.dtype) -> "Stored":
        """The same with all floats in another dtype, the inputs as they are read.

        Raises:
            DataError: a value that is too large for it.
        """
        empty = torch.empty(len(self), 0)
        _, targets, weights = Examples(empty, self.targets, self.weights).to(dtype)
        return Stored(self.inputs.to(dtype), targets, weights)


def checksums(content: NDArray[np.uint8], num_bytes: int) -> NDArray[np.uint32]:
    """CRC-32 of each row of `num_bytes`."""
    view, starts = content.data, range(0, len(content), num_bytes)
    return np.array([zlib.crc32(view[at : at + num_bytes]) for at in starts], np.uint32)


def damaged(file: Path, what: str) -> DataError:
    """The error for a file of a cache that is not as it was written."""
    return DataError(
        f"{file} {what}: this cache is damaged, by the disk or by somebody who wrote into it. "
        f"Remove the folder {file.parent}; it is made again from the data."
    )


def _read(path: Path, rows: NDArray[np.int64], into: memoryview, row_bytes: int) -> None:
    """Read rows of a file side by side; neighbours at once, whatever their places."""
    runs = list(_runs(rows))
    with path.open("rb", buffering=0) as opened:
        file = opened.fileno()
        _fetch(file, runs, row_bytes)
        for first, places in runs:
            buffers = [into[at * row_bytes : (at + 1) * row_bytes] for at in places]
            found = os.preadv(file, buffers, first * row_bytes)
            if found != len(places) * row_bytes:
                raise OSError(f"it ends in row {first + found // row_bytes}")


def _fetch(file: int, runs: Iterable[tuple[int, list[int]]], row_bytes: int) -> None:
    """Ask the disk for rows without waiting: many take the time of one."""
    if hasattr(os, "posix_fadvise"):
        for first, places in runs:
            span = first * row_bytes, len(places) * row_bytes
            os.posix_fadvise(file, *span, os.POSIX_FADV_WILLNEED)


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    """Runs of rows that follow each other: the first, and the place of each in `rows`."""
    order = np.argsort(rows, kind="stable")
    cuts = np.flatnonzero(np.diff(rows[order]) != 1) + 1
    places, ascending = order.tolist(), rows[order].tolist()
    for start, stop in pairwise([0, *cuts.tolist(), len(places)]):
        for at in range(start, stop, MOST_ROWS):
            yield ascending[at], places[at : min(at + MOST_ROWS, stop)]
