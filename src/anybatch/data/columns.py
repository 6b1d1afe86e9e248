"""Columns of a table as arrays: inputs, target and weights, from Arrow or as text.

    numbers -> [N]        lists of k numbers -> [N, k]        lists of lists -> [N, j, k]
    text label -> class, its place in `labels`

All lists of a column must have one length, declared (fixed-size lists) or not. A single input
column keeps its shape; several are concatenated to [N, k]. Text labels without `labels` are
refused: the error shows the sorted labels, which the user may pass.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import make_column_error
from anybatch.errors import DataError

__all__ = ["Columns", "choose_inputs", "convert_labels", "make_text_error"]

MAX_LABELS = 20  # distinct labels in a message


def choose_inputs(
    path: str | Path,
    names: Sequence[str],
    target: str,
    inputs: str | Sequence[str] | None,
    weights: str | None = None,
) -> list[str]:
    """Return the names of the input columns; by default all but target and weights.

    Raises:
        DataError: a column that does not exist, is named twice, or is the target too; none at all.
    """
    others = [target] if weights is None else [target, weights]
    if inputs is None:
        wanted = [name for name in names if name not in others]
    else:
        wanted = [inputs] if isinstance(inputs, str) else list(inputs)
    for name in (*others, *wanted):
        if name not in names:
            raise make_column_error(path, name, names)
    if target == weights:
        raise DataError(f"{target!r} is both target and weights. Name a column for each.")
    if target in wanted:
        raise DataError(
            f"{target!r} is both the target and an input. A model that sees its target learns "
            f"nothing. Take it out of data.args.inputs."
        )
    if not wanted or len({*wanted}) < len(wanted):
        raise DataError(
            f"The inputs of {path} are {wanted}. Name at least one column, each once. The file "
            f"has: {', '.join(map(repr, names))}."
        )
    return wanted


def convert_labels(
    values: Sequence[str], labels: Sequence[str], locate: Callable[[int], str]
) -> NDArray[np.int64]:
    """Convert text labels [N] to classes: each is its place in `labels`.

    Args:
        values: the label of each example.
        labels: the distinct labels, in the order of the classes.
        locate: returns the place of an example in the file, for the message.

    Raises:
        DataError: a label that is not in the list, or twice in it.
    """
    classes = {label: number for number, label in enumerate(labels)}
    if len(classes) < len(labels):
        raise DataError(f"data.args.labels = {list(labels)}. Each label must be in it once.")
    for row, value in enumerate(values):
        if value not in classes:
            raise DataError(
                f"{locate(row)}: the label {value!r} is not in data.args.labels = {list(labels)}. "
                f"Add it, or correct the row."
            )
    return np.array([classes[value] for value in values], np.int64)


def make_text_error(path: str | Path, target: str, values: Iterable[str], first: str) -> DataError:
    """Make the error for text labels; it shows `labels` that would turn them into classes.

    Args:
        path, target: file and column.
        first: the first label that is no number, and its place.
    """
    distinct = sorted({*values})
    head = distinct[:MAX_LABELS]
    more = f", and {len(distinct) - len(head)} more" if len(distinct) > len(head) else ""
    return DataError(
        f"{path}: the target column {target!r} holds text ({first}). It must hold numbers or "
        f"integer classes. If these are labels, it has {len(distinct)} distinct ones, which sorted "
        f"become {', '.join(f'{label!r} = {number}' for number, label in enumerate(head))}{more}. "
        f"To use these classes, set data.args.labels = {head!r}" + (" and so on." if more else ".")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Roles of the columns of an Arrow table."""

    path: str  # of the table, for messages
    inputs: tuple[str, ...]
    target: str
    weights: str | None
    labels: tuple[str, ...] | None  # text labels in the order of the classes

    @classmethod
    def choose(
        cls,
        path: str,
        schema: Any,
        target: str,
        inputs: str | Sequence[str] | None,
        labels: Sequence[str] | None,
        weights: str | None,
    ) -> "Columns":
        """Choose columns; default inputs are all but target, weights and the index of pandas.

        Raises:
            DataError: columns that do not exist, or labels for a target that is no text.
        """
        if inputs is None:
            others = (target, weights)
            inputs = [n for n in schema.names if n not in others and n[:14] != "__index_level_"]
        names = choose_inputs(path, schema.names, target, inputs, weights)
        if labels is not None and not _is_text(kind := schema.field(target).type):
            raise DataError(
                f"{path}: data.args.labels is set, but the target column {target!r} is {kind}, "
                f"not text. Take labels out."
            )
        return cls(
            path=path,
            inputs=tuple(names),
            target=target,
            weights=weights,
            labels=None if labels is None else tuple(labels),
        )

    @property
    def names(self) -> list[str]:
        """Names of the columns to read, each once."""
        others = [self.target] if self.weights is None else [self.target, self.weights]
        return list(dict.fromkeys([*self.inputs, *others]))

    def check_target(self, schema: Any, read: Callable[[], Any]) -> None:
        """Refuse a target column of text without labels.

        Args:
            read: reads the target column, for the message.

        Raises:
            DataError: it is text; the message shows the labels to set.
        """
        if self.labels is None and _is_text(schema.field(self.target).type):
            values = self._read_text(read(), 0)
            first = f"{values[0]!r} in row 0" if values else "of no row"
            raise make_text_error(self.path, self.target, values, first)

    def load(self, table: Any) -> Examples:
        """Return the examples of a whole table; errors as `convert` and `Examples.from_arrays`."""
        arrays = next(self.convert([table]))
        return Examples.from_arrays(arrays["inputs"], arrays["targets"], arrays.get("weights"))

    def convert(self, tables: Iterable[Any]) -> Iterator[dict[str, NDArray[Any]]]:
        """Convert consecutive pieces of a table to arrays "inputs", "targets" and "weights".

        Raises:
            DataError: a column that holds no numbers, is ragged, or has empty cells.
        """
        first, shapes = 0, dict[str, tuple[int, ...]]()
        for table in tables:

            def convert_column(name: str, table: Any = table, first: int = first) -> NDArray[Any]:
                place = f"{self.path}: column {name!r}"
                array = _convert(place, table.column(name).combine_chunks(), first)
                shape = shapes.setdefault(name, array.shape[1:])
                for size, before in zip(array.shape[1:], shape, strict=True):
                    if size != before:
                        raise _make_ragged_error(place, size, first, before, 0)
                return array

            arrays = {"inputs": _concatenate([convert_column(name) for name in self.inputs])}
            if self.labels is None:
                arrays["targets"] = convert_column(self.target)
            else:
                arrays["targets"] = self._convert_labels(table, self.labels, first)
            if self.weights is not None:
                arrays["weights"] = convert_column(self.weights)
            yield arrays
            first += len(table)

    def _convert_labels(self, table: Any, labels: Sequence[str], first: int) -> NDArray[np.int64]:
        values = self._read_text(table.column(self.target), first)
        return convert_labels(values, labels, lambda row: f"{self.path}, row {first + row}")

    def _read_text(self, column: Any, first: int) -> list[str]:
        array = column.combine_chunks()
        _check_no_empty(f"{self.path}: column {self.target!r}", array, first, 1)
        values: list[str] = array.to_pylist()
        return values


def _is_text(kind: Any) -> bool:
    """Return whether a column of this Arrow type holds text, or a dictionary of text."""
    types = import_module("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _concatenate(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Concatenate columns to [N, k]; keep the shape of a single one."""
    if len(arrays) == 1 and arrays[0].ndim > 1:
        return arrays[0]
    rows = [array.reshape(len(array), array[:1].size) for array in arrays]
    return np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]


def _convert(place: str, array: Any, first: int, per_row: int = 1) -> NDArray[Any]:
    """Convert an Arrow array of numbers; lists in it become further dimensions.

    Args:
        place: file and column, for the message.
        array: of numbers, or of lists.
        first: number of its first row, for the message.
        per_row: how many of its elements belong to a row of the table.
    """
    types = import_module("pyarrow.types")
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array.type, import_module("pyarrow").BaseExtensionType):
        array = array.storage
    _check_no_empty(place, array, first, per_row)
    if hasattr(array.type, "value_type"):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        size = int(lengths[0]) if len(lengths) else 0
        ragged = np.flatnonzero(lengths != size)
        if len(ragged):
            row = first + ragged[0] // per_row
            raise _make_ragged_error(place, lengths[ragged[0]], row, size, first)
        inner = _convert(place, array.flatten(), first, per_row * max(size, 1))
        return inner.reshape(len(array), size, *inner.shape[1:])
    if not (
        types.is_integer(array.type)
        or types.is_floating(array.type)
        or types.is_boolean(array.type)
    ):
        raise DataError(
            f"{place} is {array.type}. It must hold numbers or lists of numbers. Convert it, or "
            f"leave it out of data.args.inputs."
        )
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _make_ragged_error(place: str, size: int, row: int, other: int, before: int) -> DataError:
    return DataError(
        f"{place} has a list of {size} in row {row} and of {other} in row {before}. All lists must "
        f"have one length. Cut or pad them."
    )


def _check_no_empty(place: str, array: Any, first: int, per_row: int) -> None:
    if array.null_count:
        row = first + array.is_null().index(True).as_py() // per_row
        raise DataError(f"{place} is empty in row {row}. Fill the cell, or drop the row.")
