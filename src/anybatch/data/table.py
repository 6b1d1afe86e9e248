"""CSV: a line of column names, then a line of numbers for each example.

    x1,x2,label
    0.5,1.25,3

UTF-8, or UTF-16 with its mark, plain or gzipped; cells as RFC 4180 quotes them. Nothing is
guessed: what is no number is refused with its line, and text labels become classes by `labels`
alone. Files are read some rows at a time into arrays that hold the numbers alone. What does not
fit in memory is for Parquet with a cache: see `load_parquet`.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.columns import chosen, classes_of, offer
from anybatch.data.files import text_lines
from anybatch.errors import DataError

__all__ = ["load_csv"]

INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
CELLS = 2**16  # that are held as text at a time


class _Rows(NamedTuple):
    """Consecutive rows as text."""

    path: str
    cells: dict[str, Sequence[str]]  # of each column
    lines: Sequence[int]  # the line of the file that each row ends on

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


class _Numbers:
    """An array that grows by rows: in place, so that no second one is held."""

    def __init__(self, kind: Any, width: tuple[int, ...] = ()) -> None:
        self._array: NDArray[Any] = np.empty((0, *width), kind)
        self._size = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Append rows; in their dtype from now on, if the array has a narrower one."""
        self.widen(np.result_type(self._array.dtype, rows.dtype))
        needed = self._size + len(rows)
        if needed > len(self._array):
            length = max(needed, len(self._array) * 9 // 8)  # new rows cost memory at once
            self._array.resize((length, *rows.shape[1:]), refcheck=False)
        self._array[self._size : needed] = rows
        self._size = needed

    def widen(self, kind: Any) -> None:
        if self._array.dtype != kind:
            self._array = self._array.astype(kind)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def tensor(self) -> torch.Tensor:
        """All rows, which are not copied."""
        self._array.resize((self._size, *self._array.shape[1:]), refcheck=False)
        return torch.from_numpy(self._array)


def load_csv(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    delimiter: str = ",",
    weights: str | None = None,
) -> Examples:
    """Inputs [N, columns] in float32 where that holds each number exactly, otherwise in float64,
    and targets [N]: int64 if all are integers, else float64.

    Args:
        path: the file, plain or gzipped.
        target: name of the target column.
        inputs: names of the input columns, in this order; by default all others.
        labels: text labels in the order of the classes, where the target is text.
        delimiter: the character between cells.
        weights: name of the column of sample weights; None: each example counts 1.

    Raises:
        DataError: a file that is missing, in another encoding, ragged, or holds what is no finite
            number; columns that are not there; text labels without `labels`; weights below 0, or
            all 0.
    """
    pieces = _read(path, delimiter)
    first = next(pieces)
    names = chosen(path, list(first.cells), target, inputs, weights)
    numbers, classes = _Numbers(np.float32, (len(names),)), _Targets(target, labels, delimiter)
    counts = _Weights(weights)
    for rows in chain([first], pieces):
        numbers.add(_side_by_side(rows, names, exact=numbers.dtype == np.float32))
        classes.add(rows)
        counts.add(rows)
    return Examples(numbers.tensor(), classes.tensor(), counts.tensor())


def _read(path: str, delimiter: str) -> Iterator[_Rows]:
    """Rows of the file, some at a time; at least one."""
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f"data.args.delimiter = {delimiter!r}, expected one character, such as ';'")
    text = text_lines(path, "a CSV file", "Convert it: iconv -f LATIN1 -t UTF-8, for instance.")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] = []
    pieces = 0
    try:
        names = next(reader, [])
        _check_header(path, names)
        size = max(CELLS // len(names), 1)
        lines, rows = [], []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise _ragged(path, reader.line_num, cells, names, delimiter)
            lines.append(reader.line_num)
            rows.append(cells)
            if len(rows) == size:
                yield _piece(path, names, lines, rows)
                lines, rows, pieces = [], [], pieces + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. Expected cells quoted as in RFC 4180. "
            f"Is a quote not closed, or the file cut off?"
        ) from error
    if rows:
        yield _piece(path, names, lines, rows)
    elif not pieces:
        raise DataError(f"{path} has no line below its column names, expected one an example.")


def _piece(path: str, names: list[str], lines: list[int], rows: list[list[str]]) -> _Rows:
    return _Rows(path, dict(zip(names, zip(*rows, strict=True), strict=True)), lines)


def _ragged(path: str, line: int, cells: list[str], names: list[str], delimiter: str) -> DataError:
    return DataError(
        f"{path}, line {line} has {len(cells)} cells, expected {len(names)} as in the "
        f"first line. Is the file cut off, or a {delimiter!r} within a cell not quoted?"
    )


def _check_header(path: str, names: Sequence[str]) -> None:
    if not names or all(_parsed(name) is not None for name in names):
        raise DataError(
            f"{path} begins with {', '.join(names)!r}, expected a line of column names. "
            f"Put one above the numbers."
        )
    if "" in names or len({*names}) < len(names):
        raise DataError(
            f"the columns of {path} are {list(names)}, expected a name for each, and none twice. "
            f"A first one without a name is the index that pandas writes: to_csv(index=False)."
        )


def _parsed(cell: str) -> float | None:
    """The number that a cell holds, not always a finite one; None if it holds none."""
    try:
        return None if "_" in cell else float(cell)  # Python reads 1_000, other readers do not
    except ValueError:
        return None


def _numbers(rows: _Rows, name: str) -> NDArray[np.float64]:
    """A column as numbers."""
    cells = rows.cells[name]
    try:
        values = np.fromiter(map(float, cells), np.float64, len(cells))
        if np.isfinite(values).all() and not any("_" in cell for cell in cells):
            return values
    except ValueError:
        pass  # named below
    for row, cell in enumerate(cells):
        value = _parsed(cell)
        if value is None or not math.isfinite(value):
            raise DataError(
                f"{rows.place(row)}: column {name!r} holds {cell!r}, expected a finite number "
                f"such as 1.5. Mend or drop the row, or leave the column out of data.args.inputs."
            )
    return values


def _side_by_side(rows: _Rows, names: Sequence[str], *, exact: bool) -> NDArray[Any]:
    """Columns as numbers [rows, columns], in float32 if that is exact and asked for."""
    values = np.stack([_numbers(rows, name) for name in names], axis=1)
    if not exact:
        return values
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    return short if (short == values).all() else values


class _Weights:
    """The column of sample weights, if there is one."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._values = _Numbers(np.float64)
        self._place = ""  # of all rows so far
        self._first = 0

    def add(self, rows: _Rows) -> None:
        if self._name is None:
            return
        weights = _numbers(rows, self._name)
        if len(negative := np.flatnonzero(weights < 0)):
            row = negative[0]
            raise DataError(
                f"{rows.place(row)}: the weight in {self._name!r} is {weights[row]:g}, expected at "
                f"least 0. Drop the row, or give it the weight 0."
            )
        self._first = self._first or rows.lines[0]
        self._place = f"{rows.path}, lines {self._first} to {rows.lines[-1]}"
        self._values.add(weights)

    def tensor(self) -> torch.Tensor | None:
        if self._name is None:
            return None
        weights = self._values.tensor()
        if not weights.any():
            raise DataError(
                f"{self._place}: all weights in {self._name!r} are 0, expected at least one above: "
                f"no example would count. Is it the right column?"
            )
        return weights


class _Targets:
    """The target column: classes while all cells are integers or labels, numbers otherwise."""

    def __init__(self, name: str, labels: Sequence[str] | None, delimiter: str) -> None:
        self._name, self._labels, self._delimiter = name, labels, delimiter
        self._values = _Numbers(np.int64)
        self._all_integers = True
        self._too_large: DataError | None = None  # an integer of more than 64 bits

    def add(self, rows: _Rows) -> None:
        cells = rows.cells[self._name]
        if self._labels is not None:
            self._values.add(classes_of(cells, self._labels, rows.place))
            return
        if all(map(INTEGER.fullmatch, cells)):
            self._values.add(self._integers(rows, cells))
            return
        for row, cell in enumerate(cells):
            if cell and _parsed(cell) is None:
                raise self._offer(rows.path, f"{cell!r} in line {rows.lines[row]}")
        self._all_integers = False
        self._values.add(_numbers(rows, self._name))

    def _integers(self, rows: _Rows, cells: Sequence[str]) -> NDArray[Any]:
        floats = _numbers(rows, self._name)
        for row in np.flatnonzero(np.abs(floats) >= 2**63).tolist():
            if not -(2**63) <= int(cells[row]) < 2**63:
                self._too_large = self._too_large or DataError(
                    f"{rows.place(row)}: {cells[row]} in {self._name!r}, expected 64-bit integers."
                )
                return floats
        return np.array([int(cell) for cell in cells], np.int64)

    def _offer(self, path: str, first: str) -> DataError:
        pieces = _read(path, self._delimiter)
        return offer(
            path, self._name, {c for rows in pieces for c in rows.cells[self._name]}, first
        )

    def tensor(self) -> torch.Tensor:
        if self._too_large is not None and self._all_integers:
            raise self._too_large
        return self._values.tensor()
