"""Parquet: numbers and lists of numbers by column, as pyarrow reads them.

The files of a folder are taken in the order of their names. What does not fit in memory is read
through a cache of rows in files: see `anybatch.data.cache`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from anybatch.data.arrays import Examples
from anybatch.data.arrow import Columns, is_text
from anybatch.data.cache import cached
from anybatch.data.stored import Stored
from anybatch.errors import DataError
from anybatch.extras import needed
from anybatch.limits import check_unpacked

__all__ = ["load_parquet"]

PIECE_BYTES = 2**24  # read at a time into a cache
SPARING = {"pre_buffer": False, "buffer_size": 2**16}  # else whole row groups are held in memory


def load_parquet(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    weights: str | None = None,
    cache: str | bool = False,
) -> Examples | Stored:
    """Inputs and targets of a Parquet file, or of a folder of them.

    Args:
        path: the file, or a folder whose *.parquet files have the same columns.
        target: name of the target column.
        inputs: names of the input columns; by default all others but the index of pandas. One
            column keeps its shape [N, ...], several are laid side by side, [N, k].
        labels: text labels in the order of the classes, where the target is text.
        weights: name of the column of sample weights; then no input by default.
        cache: for inputs that do not fit in memory: a folder for a cache of them, made once, from
            which rows are read as they are needed; True: PATH.cache, beside the data.

    Raises:
        DataError: pyarrow is not installed; a file that is missing or damaged; columns that are
            not there, are no numbers, ragged, or have empty cells; text labels without `labels`;
            weights below 0, or all 0.
    """
    _libraries()
    files = _files(path)
    schema = _schema(files)
    columns = Columns.of(path, schema, target, inputs, labels, weights)
    if labels is None and is_text(schema.field(target).type):
        raise columns.refused_text(_whole(files, [target]).column(target))
    if cache is False:
        found = next(columns.arrays([_whole(files, columns.names)]))
        return Examples.of(found["inputs"], found["targets"], found.get("weights"))
    return cached(
        Path(f"{Path(path)}.cache" if cache is True else cache),
        made_from=files,
        asked={**asdict(columns), "path": None},  # the files say it
        pieces=lambda: columns.arrays(_pieces(files, columns.names)),
    )


def _files(path: str) -> list[Path]:
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{path} is no file and no folder with *.parquet files, expected one of these. "
            f"A relative path is looked up from the folder that you are in."
        )
    return files


def _schema(files: Sequence[Path]) -> Any:
    """Names and types of the columns, the same in all files."""
    schemas = []
    for file in files:
        with _opened(file) as opened:
            _check_unpacked(file, opened.metadata)
            schemas.append(opened.schema_arrow)
        if not schemas[-1].equals(schemas[0]):
            raise DataError(
                f"{file} has the columns {_described(schemas[-1])}, expected those of "
                f"{files[0].name}, the first in the folder: {_described(schemas[0])}."
            )
    return schemas[0]


def _check_unpacked(file: Path, metadata: Any) -> None:
    """See that a file holds no more than memory is likely to: one value can stand for millions."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    values = sum(
        group.column(i).num_values for group in groups for i in range(metadata.num_columns)
    )
    unpacked = max(sum(group.total_byte_size for group in groups), 8 * values)
    check_unpacked(file, file.stat().st_size, unpacked, DataError)


def _whole(files: Sequence[Path], names: list[str]) -> Any:
    tables = []
    for file in files:
        with _opened(file) as opened:
            tables.append(opened.read(names).replace_schema_metadata())
    return import_module("pyarrow").concat_tables(tables)


def _pieces(files: Sequence[Path], names: list[str]) -> Iterator[Any]:
    """Consecutive rows, of some PIECE_BYTES each, however large the row groups are."""
    table = import_module("pyarrow").Table
    for file in files:
        with _opened(file, **SPARING) as opened:
            one = next(opened.iter_batches(1, columns=names), None)
            size = 1 if one is None else max(1, PIECE_BYTES // max(1, one.nbytes))
            for batch in opened.iter_batches(size, columns=names):
                yield table.from_batches([batch])


def _libraries() -> tuple[Any, Any]:
    how = "anybatch[data]", "Parquet files are read by pyarrow", DataError
    return needed("pyarrow", *how), needed("pyarrow.parquet", *how)


@contextmanager
def _opened(file: Path, **options: Any) -> Iterator[Any]:
    arrow, parquet = _libraries()
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True, **options) as opened:
            yield opened
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is no readable Parquet file: {error}. Is it cut off, or another format? "
            f"Lists of a declared length must all have it."
        ) from error


def _described(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
