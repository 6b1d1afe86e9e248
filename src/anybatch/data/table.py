"""CSV: a line of column names, then a line of numbers for each example.

    x1,x2,label
    0.5,1.25,3

UTF-8, cells as RFC 4180 quotes them. Nothing is guessed: what is no number is refused with its
line, and text labels become classes by `labels` alone. Files are read whole, a cell at a time:
for more than some ten million cells take Parquet.
"""

import csv
import math
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.columns import chosen, classes_of, offer
from anybatch.data.files import text_of
from anybatch.errors import DataError

__all__ = ["load_csv"]

INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")


class _Table(NamedTuple):
    path: str
    columns: dict[str, Sequence[str]]  # the cells of each, as text
    lines: Sequence[int]  # the line of the file that each row ends on

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


def load_csv(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    delimiter: str = ",",
    weights: str | None = None,
) -> Examples:
    """Inputs [N, columns] in float64, and targets [N]: int64 if all are integers, else float64.

    Args:
        path: the file.
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
    table = _read(path, delimiter)
    names = chosen(path, list(table.columns), target, inputs, weights)
    return Examples.of(
        np.stack([_numbers(table, name) for name in names], axis=1),
        _targets(table, target, labels),
        None if weights is None else _weights(table, weights),
    )


def _read(path: str, delimiter: str) -> _Table:
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f"data.args.delimiter = {delimiter!r}, expected one character, such as ';'")
    text = text_of(path, "a CSV file", "Convert it: iconv -f LATIN1 -t UTF-8, for instance.")
    text = text.removeprefix("\ufeff")  # the mark that spreadsheets write
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        _check_header(path, names)
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}. Expected cells quoted as in RFC 4180. "
            f"Is a quote not closed, or the file cut off?"
        ) from error
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {line} has {len(cells)} cells, expected {len(names)} as in the "
                f"first line. Is the file cut off, or a {delimiter!r} within a cell not quoted?"
            )
    if not rows:
        raise DataError(f"{path} has no line below its column names, expected one an example.")
    lines, cells_of_rows = zip(*rows, strict=True)
    return _Table(path, dict(zip(names, zip(*cells_of_rows, strict=True), strict=True)), lines)


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


def _numbers(table: _Table, name: str) -> NDArray[np.float64]:
    values = np.empty(len(table.lines))
    for row, cell in enumerate(table.columns[name]):
        value = _parsed(cell)
        if value is None or not math.isfinite(value):
            raise DataError(
                f"{table.place(row)}: column {name!r} holds {cell!r}, expected a finite number "
                f"such as 1.5. Mend or drop the row, or leave the column out of data.args.inputs."
            )
        values[row] = value
    return values


def _weights(table: _Table, name: str) -> NDArray[np.float64]:
    weights = _numbers(table, name)
    if len(negative := np.flatnonzero(weights < 0)):
        row = negative[0]
        raise DataError(
            f"{table.place(row)}: the weight in {name!r} is {weights[row]:g}, expected at least 0. "
            f"Drop the row, or give it the weight 0."
        )
    if not weights.any():
        raise DataError(
            f"{table.path}, lines {table.lines[0]} to {table.lines[-1]}: all weights in {name!r} "
            f"are 0, expected at least one above: no example would count. Is it the right column?"
        )
    return weights


def _targets(table: _Table, name: str, labels: Sequence[str] | None) -> NDArray[Any]:
    cells = table.columns[name]
    if labels is not None:
        return classes_of(cells, labels, table.place)
    for row, cell in enumerate(cells):
        if cell and _parsed(cell) is None:
            raise offer(table.path, name, cells, f"{cell!r} in line {table.lines[row]}")
    if not all(map(INTEGER.fullmatch, cells)):
        return _numbers(table, name)
    integers = [int(cell) for cell in cells]
    for row, value in enumerate(integers):
        if not -(2**63) <= value < 2**63:
            raise DataError(f"{table.place(row)}: {value} in {name!r}, expected 64-bit integers.")
    return np.array(integers, np.int64)
