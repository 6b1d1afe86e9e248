"""Arrow tables as arrays: numbers and lists of numbers by column.

    numbers -> [N]        lists of k numbers -> [N, k]        lists of lists -> [N, j, k]

All lists of a column are of one length, whether it is declared (fixed-size lists) or not. One
input column keeps its shape, several are laid side by side, [N, k].
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.data.columns import chosen, classes_of, offer
from anybatch.errors import DataError

__all__ = ["Columns", "is_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a table are what."""

    path: str  # of the table, for messages
    inputs: tuple[str, ...]
    target: str
    weights: str | None
    labels: tuple[str, ...] | None  # text labels in the order of the classes

    @classmethod
    def of(
        cls,
        path: str,
        schema: Any,
        target: str,
        inputs: str | Sequence[str] | None,
        labels: Sequence[str] | None,
        weights: str | None,
    ) -> "Columns":
        """Those asked for; by default all inputs but target, weights and the index of pandas.

        Raises:
            DataError: columns that are not there, or labels for a target that is no text.
        """
        if inputs is None:
            others = (target, weights)
            inputs = [n for n in schema.names if n not in others and n[:14] != "__index_level_"]
        names = chosen(path, schema.names, target, inputs, weights)
        if labels is not None and not is_text(kind := schema.field(target).type):
            raise DataError(
                f"{path}: the target column {target!r} is {kind} and data.args.labels are given, "
                f"expected text to map. Take them out."
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
        """Each column that is to be read, once."""
        others = [self.target] if self.weights is None else [self.target, self.weights]
        return list(dict.fromkeys([*self.inputs, *others]))

    def arrays(self, tables: Iterable[Any]) -> Iterator[dict[str, NDArray[Any]]]:
        """Inputs, targets and weights of consecutive pieces of the table, as `Examples.of` takes.

        Raises:
            DataError: a column that is no numbers, ragged, or has empty cells.
        """
        first, shapes = 0, dict[str, tuple[int, ...]]()
        for table in tables:

            def values(name: str, table: Any = table, first: int = first) -> NDArray[Any]:
                what = f"{self.path}: column {name!r}"
                array = _values(what, table.column(name).combine_chunks(), first)
                shape = shapes.setdefault(name, array.shape[1:])
                for size, before in zip(array.shape[1:], shape, strict=True):
                    if size != before:
                        raise _ragged(what, size, first, before, 0)
                return array

            piece = {"inputs": _side_by_side([values(name) for name in self.inputs])}
            if self.labels is None:
                piece["targets"] = values(self.target)
            else:
                piece["targets"] = self._classes(table.column(self.target), self.labels, first)
            if self.weights is not None:
                piece["weights"] = values(self.weights)
            yield piece
            first += len(table)

    def refused_text(self, column: Any) -> DataError:
        """The error for a target column of text without labels, with the mapping that it needs."""
        values = self._text(column, 0)
        first = f"{values[0]!r} in row 0" if values else "of no row"
        return offer(self.path, self.target, values, first)

    def _classes(self, column: Any, labels: Sequence[str], first: int) -> NDArray[np.int64]:
        values = self._text(column, first)
        return classes_of(values, labels, lambda row: f"{self.path}, row {first + row}")

    def _text(self, column: Any, first: int) -> list[str]:
        array = column.combine_chunks()
        _refuse_empty(f"{self.path}: column {self.target!r}", array, first, 1)
        found: list[str] = array.to_pylist()
        return found


def is_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds text, dictionaries of text included."""
    types = import_module("pyarrow.types")
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _side_by_side(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len(arrays) == 1 and arrays[0].ndim > 1:
        return arrays[0]
    rows = [array.reshape(len(array), array[:1].size) for array in arrays]
    return np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]


def _values(what: str, array: Any, first: int, per_row: int = 1) -> NDArray[Any]:
    """Numbers of an Arrow array, lists within it as further dimensions.

    Args:
        what: file and column, for the message.
        array: of numbers, or of lists.
        first: number of its first row, for the message.
        per_row: how many elements of it belong to a row of the table.
    """
    types = import_module("pyarrow.types")
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if isinstance(array.type, import_module("pyarrow").BaseExtensionType):
        array = array.storage
    _refuse_empty(what, array, first, per_row)
    if hasattr(array.type, "value_type"):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        size = int(lengths[0]) if len(lengths) else 0
        ragged = np.flatnonzero(lengths != size)
        if len(ragged):
            row = first + ragged[0] // per_row
            raise _ragged(what, lengths[ragged[0]], row, size, first)
        within = _values(what, array.flatten(), first, per_row * max(size, 1))
        return within.reshape(len(array), size, *within.shape[1:])
    if not (
        types.is_integer(array.type)
        or types.is_floating(array.type)
        or types.is_boolean(array.type)
    ):
        raise DataError(
            f"{what} is {array.type}, expected numbers or lists of numbers. Convert it, or leave "
            f"it out of data.args.inputs."
        )
    return array.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _ragged(what: str, size: int, row: int, other: int, before: int) -> DataError:
    return DataError(
        f"{what} has a list of {size} in row {row} and of {other} in row {before}, expected one "
        f"length. Cut or pad them."
    )


def _refuse_empty(what: str, array: Any, first: int, per_row: int) -> None:
    if array.null_count:
        row = first + array.is_null().index(True).as_py() // per_row
        raise DataError(f"{what} is empty in row {row}, expected a number. Mend or drop the row.")
