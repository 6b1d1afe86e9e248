"""Parquet: numbers and lists of numbers by column, as pyarrow reads them.

    numbers -> [N]        lists of k numbers -> [N, k]        lists of lists -> [N, j, k]

All lists of a column are of one length, whether it is declared (fixed-size lists) or not. The
files of a folder are taken in the order of their names.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.columns import chosen, classes_of, offer
from anybatch.errors import DataError

__all__ = ["load_parquet"]


def load_parquet(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Examples:
    """Inputs and targets of a Parquet file, or of a folder of them.

    Args:
        path: the file, or a folder whose *.parquet files have the same columns.
        target: name of the target column.
        inputs: names of the input columns; by default all others but the index of pandas. One
            column keeps its shape [N, ...], several are laid side by side, [N, k].
        labels: text labels in the order of the classes, where the target is text.

    Raises:
        DataError: pyarrow is not installed; a file that is missing or damaged; columns that are
            not there, are no numbers, ragged, or have empty cells; text labels without `labels`.
    """
    table = _read(path)
    if inputs is None:
        inputs = [n for n in table.column_names if n != target and n[:14] != "__index_level_"]
    names = chosen(path, table.column_names, target, inputs)
    arrays = [_values(f"{path}: column {n!r}", table.column(n).combine_chunks()) for n in names]
    if len(arrays) > 1 or arrays[0].ndim == 1:
        arrays = [array.reshape(len(array), array[:1].size) for array in arrays]
    return Examples.of(
        np.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0],
        _targets(path, target, table.column(target).combine_chunks(), labels),
    )


def _read(path: str) -> Any:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            "Parquet files are read by pyarrow, which is not installed. "
            "Install it: pip install 'anybatch[data]'."
        ) from error
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{path} is no file and no folder with *.parquet files, expected one of these. "
            f"A relative path is looked up from the folder that you are in."
        )
    tables = []
    for file in files:
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
                tables.append(opened.read().replace_schema_metadata())
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{file} is no readable Parquet file: {error}. Is it cut off, or another format? "
                f"Lists of a declared length must all have it."
            ) from error
        if not tables[-1].schema.equals(tables[0].schema):
            raise DataError(
                f"{file} has the columns {_columns(tables[-1])}, expected those of "
                f"{files[0].name}, the first in the folder: {_columns(tables[0])}."
            )
    return arrow.concat_tables(tables)


def _columns(table: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def _values(what: str, array: Any, per_row: int = 1) -> NDArray[Any]:
    """Numbers of an Arrow array, lists within it as further dimensions.

    Args:
        what: file and column, for the message.
        array: of numbers, or of lists.
        per_row: how many elements of it belong to a row of the table.
    """
    types = import_module("pyarrow.types")
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        row = array.is_null().index(True).as_py() // per_row
        raise DataError(f"{what} is empty in row {row}, expected a number. Mend or drop the row.")
    if hasattr(array.type, "value_type"):
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        size = int(lengths[0]) if len(lengths) else 0
        ragged = np.flatnonzero(lengths != size)
        if len(ragged):
            raise DataError(
                f"{what} has a list of {lengths[ragged[0]]} in row {ragged[0] // per_row} and of "
                f"{size} in row 0, expected one length. Cut or pad them."
            )
        within = _values(what, array.flatten(), per_row * max(size, 1))
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


def _targets(path: str, name: str, array: Any, labels: Sequence[str] | None) -> NDArray[Any]:
    types = import_module("pyarrow.types")
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_text = types.is_string(array.type) or types.is_large_string(array.type)
    if labels is not None and not is_text:
        raise DataError(
            f"{path}: the target column {name!r} is {array.type} and data.args.labels are given, "
            f"expected text to map. Take them out."
        )
    if not is_text or array.null_count:
        return _values(f"{path}: column {name!r}", array)
    values = array.to_pylist()
    if labels is None:
        raise offer(path, name, values, f"{values[0]!r} in row 0" if values else "of no row")
    return classes_of(values, labels, lambda row: f"{path}, row {row}")
