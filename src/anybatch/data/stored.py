"""Examples whose inputs stay in a file, for those that do not fit in memory.

    row i lies at bytes  i S .. (i + 1) S - 1,    S bytes a row

Rows are read by position, a batch at a time, and checked: each has a CRC-32, kept in memory. They
are not mapped: pages of a map count as memory of the process, and damage would end it.
`anybatch.data.cache` writes such files.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.data.arrays import Examples
from anybatch.errors import DataError

__all__ = ["Stored", "StoredRows", "checksums", "damaged"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """One column [N, ...] in a file, read by row: see `anybatch.training.batches.Rows`."""

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
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self):
            raise IndexError(f"ids {ids.tolist()} of {len(self)} rows: expected 0 to N - 1.")
        places = (ids if self.ids is None else self.ids[ids]).numpy()
        num_bytes = self.kind.itemsize * int(np.prod(self.row))
        content = np.empty(len(places) * num_bytes, np.uint8)
        try:
            _read(self.path, places.tolist(), content.data, num_bytes)
        except OSError as error:
            raise damaged(self.path, f"cannot be read ({error})") from error
        wrong = np.flatnonzero(checksums(content, num_bytes) != self.checksums[places])
        if len(wrong):
            raise damaged(self.path, f"row {places[wrong[0]]} is not what was written")
        numbers = content.view(self.kind).reshape(len(places), *self.row)
        return torch.from_numpy(numbers).to(self.dtype)

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


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """N examples whose inputs are in a file; targets and weights are in memory."""

    inputs: StoredRows  # [N, ...]
    beside: Examples  # targets and weights; its own inputs are [N, 0]

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def targets(self) -> Tensor:
        """[N] of int64 classes, or [N, ...] of numbers."""
        return self.beside.targets

    @property
    def weights(self) -> Tensor | None:
        """[N], what each example counts; None: 1."""
        return self.beside.weights

    @property
    def columns(self) -> tuple[Tensor | StoredRows, ...]:
        """What `steps` and `evaluate` take as data: (inputs, targets), or with the weights."""
        return (self.inputs, *self.beside.columns[1:])

    @property
    def collate(self) -> None:
        """Rows are gathered by index."""

    def of_ids(self, ids: Tensor) -> "Stored":
        """The examples of these ids, in their order; nothing is read."""
        return Stored(self.inputs.of_ids(ids), self.beside.of_ids(ids))

    def to(self, dtype: torch.dtype) -> "Stored":
        """The same with all floats in another dtype, the inputs as they are read.

        Raises:
            DataError: a value that is too large for it.
        """
        return Stored(self.inputs.to(dtype), self.beside.to(dtype))


def checksums(content: NDArray[np.uint8], num_bytes: int) -> NDArray[np.uint32]:
    """CRC-32 of each row of `num_bytes`."""
    starts = range(0, len(content), num_bytes)
    return np.array([zlib.crc32(content.data[at : at + num_bytes]) for at in starts], np.uint32)


def damaged(file: Path, what: str) -> DataError:
    """The error for a file of a cache that is not as it was written."""
    return DataError(
        f"{file} {what}: this cache is damaged, by the disk or by somebody who wrote into it. "
        f"Remove the folder {file.parent}; it is made again from the data."
    )


def _read(path: Path, rows: list[int], into: memoryview, num_bytes: int) -> None:
    """Read rows of a file side by side; neighbours at once, whatever their places."""
    most = max(1, min(512, 2**30 // num_bytes))  # buffers and bytes that one call takes
    runs = list(_runs(rows, most))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            for first, places in runs:  # a disk fetches many at once in the time of one
                span = first * num_bytes, len(places) * num_bytes
                os.posix_fadvise(file.fileno(), *span, os.POSIX_FADV_WILLNEED)
        for first, places in runs:
            buffers = [into[at * num_bytes : (at + 1) * num_bytes] for at in places]
            found = os.preadv(file.fileno(), buffers, first * num_bytes)
            if found != len(places) * num_bytes:
                raise OSError(f"it ends in row {first + found // num_bytes}")


def _runs(rows: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Runs of rows that follow each other: the first, and the place of each in `rows`."""
    first, places = 0, list[int]()
    for place in sorted(range(len(rows)), key=rows.__getitem__):
        if places and (rows[place] != first + len(places) or len(places) == most):
            yield first, places
            places = []
        first = first if places else rows[place]
        places.append(place)
    if places:
        yield first, places
