"""CSV: a line of column names, then a line of numbers for each example.

    x1,x2,label
    0.5,1.25,3

The text is UTF-8, or UTF-16 with a byte order mark, plain or gzipped; cells are quoted as in RFC
4180. A cell that is no number is refused with its line, and text labels become classes only by
`labels`. The file is read some rows at a time into arrays of numbers. For data that do not fit in
memory use Parquet with a cache: see `load_parquet`.
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
from anybatch.data.columns import choose_inputs, convert_labels, make_text_error
from anybatch.data.files import read_lines
from anybatch.errors import DataError

__all__ = ["load_csv"]

INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
MAX_CELLS = 2**16  # held as text at a time


class _Rows(NamedTuple):
    """Consecutive rows as text."""

    path: str
    cells: dict[str, Sequence[str]]  # of each column
    lines: Sequence[int]  # the line of the file that each row ends on

    def locate(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


class _GrowingArray:
    """Array that grows by rows, in place, so that memory holds it once."""

    def __init__(self, kind: Any, width: tuple[int, ...] = ()) -> None:
        self._array: NDArray[Any] = np.empty((0, *width), kind)
        self._size = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows; the whole array takes their dtype if it is wider."""
        kind = np.result_type(self._array.dtype, rows.dtype)
        if self._array.dtype != kind:
            self._array = self._array.astype(kind)
        size = self._size + len(rows)
        if size > len(self._array):
            capacity = max(size, len(self._array) * 9 // 8)  # memory is taken for all of it
            self._array.resize((capacity, *rows.shape[1:]), refcheck=False)
        self._array[self._size : size] = rows
        self._size = size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def to_tensor(self) -> torch.Tensor:
        """Return all rows without a copy."""
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
    """Load inputs [N, columns] and targets [N] from a CSV file.

    Inputs are float32 if that holds each number exactly, otherwise float64. Targets are int64 if
    all are integers, otherwise float64.

    >>> from pathlib import Path
    >>> from anybatch.data import load_csv
    >>> _ = Path("rows.csv").write_text("x1,x2,label\\n0.5,1.25,3\\n1.5,0,1\\n")
    >>> load_csv("rows.csv", target="label").targets
    tensor([3, 1])

    Args:
        path: the file, plain or gzipped.
        target: name of the target column.
        inputs: names of the input columns, in this order; by default all others.
        labels: text labels in the order of the classes, if the target is text.
        delimiter: the character between cells.
        weights: name of the column of sample weights; None: each example counts 1.

    Raises:
        DataError: a file that is missing, in another encoding, ragged, or with a cell that is no
            finite number; columns that do not exist; text labels without `labels`; weights below
            0, or all 0.
    """
    pieces = _read_rows(path, delimiter)
    first = next(pieces)
    names = choose_inputs(path, list(first.cells), target, inputs, weights)
    input_rows = _GrowingArray(np.float32, (len(names),))
    target_column, weight_column = _Targets(target, labels, delimiter), _Weights(weights)
    for rows in chain([first], pieces):
        input_rows.append(_parse_inputs(rows, names, exact=input_rows.dtype == np.float32))
        target_column.append(rows)
        weight_column.append(rows)
    return Examples(input_rows.to_tensor(), target_column.to_tensor(), weight_column.to_tensor())


def _read_rows(path: str, delimiter: str) -> Iterator[_Rows]:
    """Read the rows of the file, some at a time; at least one."""
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"data.args.delimiter = {delimiter!r}. It must be one character, such as ';'."
        )
    text = read_lines(path, "a CSV file", "Convert it: iconv -f LATIN1 -t UTF-8, for instance.")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    lines: list[int] = []
    rows: list[list[str]] = []
    is_empty = True
    try:
        names = next(reader, [])
        _check_header(path, names)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells. The first line has "
                    f"{len(names)}. Is the file cut off, or a {delimiter!r} in a cell not quoted?"
                )
            lines.append(reader.line_num)
            rows.append(cells)
            if len(rows) == max(MAX_CELLS // len(names), 1):
                yield _Rows(path, dict(zip(names, zip(*rows, strict=True), strict=True)), lines)
                lines, rows, is_empty = [], [], False
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. Cells must be quoted as in RFC 4180. Is a "
            f"quote not closed, or the file cut off?"
        ) from error
    if rows:
        yield _Rows(path, dict(zip(names, zip(*rows, strict=True), strict=True)), lines)
    elif is_empty:
        raise DataError(f"{path} has no line below its column names. Add one for each example.")


def _check_header(path: str, names: Sequence[str]) -> None:
    if not names or all(_parse(name) is not None for name in names):
        raise DataError(
            f"{path} begins with {', '.join(names)!r}. It must begin with a line of column names. "
            f"Put one above the numbers."
        )
    if "" in names or len({*names}) < len(names):
        raise DataError(
            f"The columns of {path} are {list(names)}. Each needs a name of its own. A first one "
            f"without a name is the index that pandas writes: to_csv(index=False)."
        )


def _parse(cell: str) -> float | None:
    """Return the number that a cell holds, finite or not; None if it holds none."""
    try:
        return None if "_" in cell else float(cell)  # Python reads 1_000, other readers do not
    except ValueError:
        return None


def _parse_column(rows: _Rows, name: str) -> NDArray[np.float64]:
    """Parse a column of finite numbers."""
    cells = rows.cells[name]
    try:
        values = np.fromiter(map(float, cells), np.float64, len(cells))
        if np.isfinite(values).all() and not any("_" in cell for cell in cells):
            return values
    except ValueError:
        pass  # the loop below names the cell
    for row, cell in enumerate(cells):
        value = _parse(cell)
        if value is None or not math.isfinite(value):
            raise DataError(
                f"{rows.locate(row)}: column {name!r} holds {cell!r}. It must be a finite number "
                f"such as 1.5. Correct or drop the row, or leave the column out of "
                f"data.args.inputs."
            )
    return values


def _parse_inputs(rows: _Rows, names: Sequence[str], *, exact: bool) -> NDArray[Any]:
    """Parse input columns to [rows, columns]: to float32 if `exact` and it holds each number."""
    values = np.stack([_parse_column(rows, name) for name in names], axis=1)
    if not exact:
        return values
    with np.errstate(over="ignore"):
        short = values.astype(np.float32)
    return short if (short == values).all() else values


class _Weights:
    """Column of sample weights, if there is one."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._values = _GrowingArray(np.float64)
        self._place = ""  # of all rows so far
        self._first = 0

    def append(self, rows: _Rows) -> None:
        if self._name is None:
            return
        weights = _parse_column(rows, self._name)
        if len(negative := np.flatnonzero(weights < 0)):
            row = negative[0]
            raise DataError(
                f"{rows.locate(row)}: the weight in {self._name!r} is {weights[row]:g}. It must be "
                f"at least 0. Drop the row, or give it the weight 0."
            )
        self._first = self._first or rows.lines[0]
        self._place = f"{rows.path}, lines {self._first} to {rows.lines[-1]}"
        self._values.append(weights)

    def to_tensor(self) -> torch.Tensor | None:
        if self._name is None:
            return None
        weights = self._values.to_tensor()
        if not weights.any():
            raise DataError(
                f"{self._place}: all weights in {self._name!r} are 0. At least one must be above "
                f"0, or no example counts. Is it the right column?"
            )
        return weights


class _Targets:
    """Target column: classes while all cells are integers or labels, otherwise numbers."""

    def __init__(self, name: str, labels: Sequence[str] | None, delimiter: str) -> None:
        self._name, self._labels, self._delimiter = name, labels, delimiter
        self._values = _GrowingArray(np.int64)
        self._all_integers = True
        self._overflow: DataError | None = None  # for an integer of more than 64 bits

    def append(self, rows: _Rows) -> None:
        cells = rows.cells[self._name]
        if self._labels is not None:
            self._values.append(convert_labels(cells, self._labels, rows.locate))
            return
        if all(map(INTEGER.fullmatch, cells)):
            self._values.append(self._parse_integers(rows, cells))
            return
        for row, cell in enumerate(cells):
            if cell and _parse(cell) is None:
                raise self._make_text_error(rows.path, f"{cell!r} in line {rows.lines[row]}")
        self._all_integers = False
        self._values.append(_parse_column(rows, self._name))

    def _parse_integers(self, rows: _Rows, cells: Sequence[str]) -> NDArray[Any]:
        floats = _parse_column(rows, self._name)
        for row in np.flatnonzero(np.abs(floats) >= 2**63).tolist():
            if not -(2**63) <= int(cells[row]) < 2**63:
                # Raised at the end if all cells are integers; otherwise they are floats anyway.
                self._overflow = self._overflow or DataError(
                    f"{rows.locate(row)}: {cells[row]} in {self._name!r} does not fit in 64 bits. "
                    f"Use smaller integers."
                )
                return floats
        return np.array([int(cell) for cell in cells], np.int64)

    def _make_text_error(self, path: str, first: str) -> DataError:
        pieces = _read_rows(path, self._delimiter)
        labels = {cell for rows in pieces for cell in rows.cells[self._name]}
        return make_text_error(path, self._name, labels, first)

    def to_tensor(self) -> torch.Tensor:
        if self._overflow is not None and self._all_integers:
            raise self._overflow
        return self._values.to_tensor()
