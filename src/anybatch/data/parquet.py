"""Parquet: numbers and lists of numbers by column, as pyarrow reads them.

The files of a folder are taken in the order of their names, without hidden ones (.name, _name).
Folders named key=value, as Hive partitions a table, become a column of that key.
What does not fit in memory is read through a cache of rows in files: see `anybatch.data.cache`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from anybatch.data.arrays import Examples
from anybatch.data.arrow import Columns, is_text
from anybatch.data.cache import cached
from anybatch.data.stored import Stored
from anybatch.errors import DataError
from anybatch.extras import import_extra
from anybatch.limits import check_parquet
from anybatch.paths import check_local

__all__ = ["load_parquet", "schema_of"]

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
        made_from=[file.path for file in files],
        asked={**asdict(columns), "path": None},  # the files say it
        pieces=lambda: columns.arrays(_pieces(files, columns.names)),
    )


def schema_of(path: str) -> Any:
    """Read names and types of the columns of a Parquet file or folder.

    Raises:
        DataError: see `load_parquet`.
    """
    return _schema(_files(path))


class _File(NamedTuple):
    """One file, and the columns that the folders above it stand for."""

    path: Path
    constants: dict[str, Any]

    def completed(self, table: Any, names: list[str]) -> Any:
        """Columns of a piece of the file in this order, with those of the folders."""
        for name, value in self.constants.items():
            if name in names and name not in table.column_names:
                repeated = import_module("pyarrow").repeat(value, len(table))
                table = table.append_column(name, repeated)
        return table.select(names)

    def own(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.constants]


def _files(path: str) -> list[_File]:
    check_local(path, "a Parquet file or folder", DataError)
    root = Path(path)
    files = sorted(_inside(root)) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{path} is no file and no folder with *.parquet files, expected one of these. "
            f"A relative path is looked up from the folder that you are in."
        )
    partitions = [_partition(file.relative_to(root)) for file in files]
    texts = {key for one in partitions for key, value in one.items() if not _is_integer(value)}
    return [
        _File(file, {key: value if key in texts else int(value) for key, value in one.items()})
        for file, one in zip(files, partitions, strict=True)
    ]


def _inside(folder: Path) -> Iterator[Path]:
    """Files of a folder and of its folders named key=value, without hidden ones."""
    for path in folder.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir() and "=" in path.name:
            yield from _inside(path)
        elif path.suffix == ".parquet":
            yield path


def _partition(file: Path) -> dict[str, str]:
    """Keys and values of the folders named key=value above a file."""
    pairs = (part.partition("=") for part in file.parts[:-1])
    return {unquote(key): unquote(value) for key, _, value in pairs}


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _schema(files: Sequence[_File]) -> Any:
    """Names and types of the columns, the same in all files."""
    schemas = []
    for file in files:
        with _opened(file.path) as opened:
            check_parquet(file.path, opened.metadata, DataError)
            schema = opened.schema_arrow
        for name, value in file.constants.items():
            if name not in schema.names:
                schema = schema.append(_field(name, value))
        schemas.append(schema)
        if not schemas[-1].equals(schemas[0]):
            raise DataError(
                f"{file.path} has the columns {_described(schemas[-1])}, expected those of "
                f"{files[0].path.name}, the first in the folder: {_described(schemas[0])}."
            )
    return schemas[0]


def _field(name: str, value: str | int) -> Any:
    arrow = import_module("pyarrow")
    return arrow.field(name, arrow.int64() if isinstance(value, int) else arrow.string())


def _whole(files: Sequence[_File], names: list[str]) -> Any:
    tables = []
    for file in files:
        with _opened(file.path) as opened:
            table = opened.read(file.own(names)).replace_schema_metadata()
        tables.append(file.completed(table, names))
    return import_module("pyarrow").concat_tables(tables)


def _pieces(files: Sequence[_File], names: list[str]) -> Iterator[Any]:
    """Consecutive rows, of some PIECE_BYTES each, however large the row groups are."""
    table = import_module("pyarrow").Table
    for file in files:
        own = file.own(names)
        with _opened(file.path, **SPARING) as opened:
            one = next(opened.iter_batches(1, columns=own), None)
            size = 1 if one is None else max(1, PIECE_BYTES // max(1, one.nbytes))
            for batch in opened.iter_batches(size, columns=own):
                yield file.completed(table.from_batches([batch]), names)


def _libraries() -> tuple[Any, Any]:
    how = "anybatch[data]", "Parquet files are read by pyarrow", DataError
    return import_extra("pyarrow", *how), import_extra("pyarrow.parquet", *how)


@contextmanager
def _opened(file: Path, **options: Any) -> Iterator[Any]:
    arrow, parquet = _libraries()
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True, **options) as opened:
            yield opened
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} is no readable Parquet file: {error}. Is it cut off, or another format? "
            f"Lists of a declared length must all have it."
        ) from error


def _described(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
