"""Parquet: numbers and lists of numbers by column, read by pyarrow.

The files of a folder are read in the order of their names, except hidden ones (.name, _name). A
folder named key=value, as Hive partitions a table, adds a column of that key. Data that do not fit
in memory are read through a cache of rows in files: see `anybatch.data.cache`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from anybatch.data.arrays import Examples
from anybatch.data.cache import open_cache
from anybatch.data.columns import Columns
from anybatch.data.stored import Stored
from anybatch.errors import DataError
from anybatch.extras import import_extra
from anybatch.limits import check_parquet
from anybatch.paths import check_local

__all__ = ["load_parquet", "read_schema"]

PIECE_BYTES = 2**24  # read at a time into a cache
SMALL_BUFFERS = {"pre_buffer": False, "buffer_size": 2**16}  # by default memory holds row groups


def load_parquet(
    path: str,
    target: str,
    inputs: str | Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    weights: str | None = None,
    cache: str | bool = False,
) -> Examples | Stored:
    """Load inputs and targets of a Parquet file, or of a folder of them.

    Args:
        path: the file, or a folder whose *.parquet files have the same columns.
        target: name of the target column.
        inputs: names of the input columns; by default all others but the index of pandas. One
            column keeps its shape [N, ...]; several are concatenated to [N, k].
        labels: text labels in the order of the classes, if the target is text.
        weights: name of the column of sample weights, which is then no input by default.
        cache: for inputs that do not fit in memory: a folder for a cache of them, which is made
            once and from which rows are read when needed; True: PATH.cache, next to the data.

    Raises:
        DataError: pyarrow is not installed; a file that is missing or damaged; columns that do
            not exist, hold no numbers, are ragged, or have empty cells; text labels without
            `labels`; weights below 0, or all 0.
    """
    _import_pyarrow()
    files = _list_files(path)
    schema = _read_schema(files)
    columns = Columns.choose(path, schema, target, inputs, labels, weights)
    columns.check_target(schema, lambda: _read(files, [target]).column(target))
    if cache is False:
        return columns.load(_read(files, columns.names))
    return open_cache(
        Path(f"{Path(path)}.cache" if cache is True else cache),
        files=[file.path for file in files],
        request={**asdict(columns), "path": None},  # the files are in the key already
        read_pieces=lambda: columns.convert(_read_pieces(files, columns.names)),
    )


def read_schema(path: str) -> Any:
    """Read names and types of the columns of a Parquet file or folder."""
    return _read_schema(_list_files(path))


class _File(NamedTuple):
    """One file, and the columns that the folders above it add."""

    path: Path
    constants: dict[str, Any]

    def complete(self, table: Any, names: list[str]) -> Any:
        """Add the columns of the folders to a piece of the file, and put all in this order."""
        for name, value in self.constants.items():
            if name in names and name not in table.column_names:
                repeated = import_module("pyarrow").repeat(value, len(table))
                table = table.append_column(name, repeated)
        return table.select(names)

    def select_names(self, names: list[str]) -> list[str]:
        """Return those names that are columns of the file itself."""
        return [name for name in names if name not in self.constants]


def _list_files(path: str) -> list[_File]:
    check_local(path, "a Parquet file or folder", DataError)
    root = Path(path)
    files = sorted(_walk(root)) if root.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{path} is no file and no folder with *.parquet files. Name one of these. A relative "
            f"path starts at the current folder."
        )
    partitions = [_parse_partition(file.relative_to(root)) for file in files]
    # A key whose values are integers in all files is a column of integers.
    texts = {key for values in partitions for key, value in values.items() if not _is_int(value)}
    return [
        _File(file, {key: value if key in texts else int(value) for key, value in values.items()})
        for file, values in zip(files, partitions, strict=True)
    ]


def _walk(folder: Path) -> Iterator[Path]:
    """List the files of a folder and of its folders named key=value, except hidden ones."""
    for path in folder.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir() and "=" in path.name:
            yield from _walk(path)
        elif path.suffix == ".parquet":
            yield path


def _parse_partition(file: Path) -> dict[str, str]:
    """Return keys and values of the folders named key=value above a file."""
    pairs = (folder.partition("=") for folder in file.parts[:-1])
    return {unquote(key): unquote(value) for key, _, value in pairs}


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _read_schema(files: Sequence[_File]) -> Any:
    """Read names and types of the columns, which must be the same in all files."""
    arrow = import_module("pyarrow")
    first: Any = None
    for file in files:
        with _open(file.path) as parquet:
            check_parquet(file.path, parquet.metadata, DataError)
            schema = parquet.schema_arrow
        for name, value in file.constants.items():
            if name not in schema.names:
                kind = arrow.int64() if isinstance(value, int) else arrow.string()
                schema = schema.append(arrow.field(name, kind))
        first = schema if first is None else first
        if not schema.equals(first):
            raise DataError(
                f"{file.path} has the columns {_format_schema(schema)}. All files of a folder must "
                f"have those of the first, {files[0].path.name}: {_format_schema(first)}."
            )
    return first


def _read(files: Sequence[_File], names: list[str]) -> Any:
    """Read columns of all files into one table."""
    tables = []
    for file in files:
        with _open(file.path) as parquet:
            table = parquet.read(file.select_names(names)).replace_schema_metadata()
        tables.append(file.complete(table, names))
    return import_module("pyarrow").concat_tables(tables)


def _read_pieces(files: Sequence[_File], names: list[str]) -> Iterator[Any]:
    """Read consecutive rows, of about PIECE_BYTES each, even if row groups are larger."""
    table = import_module("pyarrow").Table
    for file in files:
        in_file = file.select_names(names)
        with _open(file.path, **SMALL_BUFFERS) as parquet:
            row = next(parquet.iter_batches(1, columns=in_file), None)
            size = 1 if row is None else max(1, PIECE_BYTES // max(1, row.nbytes))
            for batch in parquet.iter_batches(size, columns=in_file):
                yield file.complete(table.from_batches([batch]), names)


def _import_pyarrow() -> tuple[Any, Any]:
    reason = "anybatch[data]", "Parquet files are read by pyarrow", DataError
    return import_extra("pyarrow", *reason), import_extra("pyarrow.parquet", *reason)


@contextmanager
def _open(file: Path, **options: Any) -> Iterator[Any]:
    arrow, parquet = _import_pyarrow()
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True, **options) as reader:
            yield reader
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} is no readable Parquet file: {error}. Is it cut off, or another format? "
            f"Lists of a declared length must all have it."
        ) from error


def _format_schema(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
