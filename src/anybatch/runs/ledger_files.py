"""Ledger of a run on disk: a Parquet data set with one row for each visit of an example.

    RUN/ledger/steps-000000000000-000000000123.parquet    the rows of the updates 0 .. 122

Columns: step, epoch, example (its id), then loss, count, coefficient, each metric, and norm,
alignment, share and projection (k numbers) where they were observed. A file is written with each
checkpoint, whole or not at all. So a resumed run, which makes later steps again, has each row once.

`rank_examples` lists the examples that drive a run:

    norm, loss, share    means over the visits of an example
    forgetting           how often it was right at one visit and wrong at the next

Source of forgetting: Toneva et al. 2019, 1812.05159, definition 2.1.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.errors import RunError
from anybatch.extras import import_extra
from anybatch.gradient import Gradient
from anybatch.limits import check_parquet, shorten
from anybatch.runs.checksums import AnnounceChanges, Checksums, ignore_changes, read_file_state
from anybatch.runs.disk import (
    check_file,
    check_folder,
    make_disk_error,
    make_folder,
    open_replacement,
)

__all__ = [
    "PROJECTION",
    "By",
    "LedgerFiles",
    "average_visits",
    "iterate_projections",
    "make_columns",
    "rank_examples",
    "read_ledger",
]

By = Literal["norm", "loss", "share", "forgetting"]

PROJECTION = "projection"
"""Column of random projections. It is as large as hundreds of others, and is read by itself."""

_IDS = ("step", "epoch", "example")
_NAME = re.compile(r"steps-(\d{12})-(\d{12})\.parquet")
_OPTION = {"norm": "observe.norms", "share": "observe.share", "loss": "observe.norms"}
_COLUMN = {"norm": "norm", "loss": "loss", "share": "share", "forgetting": "accuracy"}


class LedgerFiles:
    """Ledger files of a run, open for appending.

    Raises:
        RunError: pyarrow is not installed.
    """

    def __init__(self, folder: Path, announce: AnnounceChanges = ignore_changes) -> None:
        self._announce = announce
        self._arrow, self._parquet = _import_arrow()
        self._folder = folder
        self._rows: list[dict[str, Tensor]] = []  # a dict of columns for each share
        self._first = self._next = 0  # the rows are of the steps from _first to before _next

    def begin(self, step: int) -> None:
        """Drop the rows of this step and later ones, which are made again."""
        later = [file for file, _, stop in _list_files(self._folder) if stop > step]
        with self._announce(dict.fromkeys(later)):
            for file in later:
                file.unlink()
        self._first = self._next = step

    def add(self, step: int, shares: Iterable[dict[str, Tensor]]) -> None:
        """Add the rows of an update: the columns of each share."""
        self._rows += [columns for columns in shares if len(columns["step"])]
        self._next = step + 1

    def read_norms(self, ids: Sequence[int]) -> dict[int, list[float]]:
        """Read the norms that examples had at earlier visits, by id; {} if none were observed."""
        norms: dict[int, list[float]] = {}
        for file, _, _ in _list_files(self._folder):
            with suppress(RunError, OSError, self._arrow.ArrowException):  # a damaged file
                for example, norm in self._read_visits(file, ids):
                    norms.setdefault(example, []).append(norm)
        for columns in self._rows:
            if "norm" in columns:
                for place in torch.isin(columns["example"], torch.tensor(ids)).nonzero()[:, 0]:
                    example = int(columns["example"][place])
                    norms.setdefault(example, []).append(float(columns["norm"][place]))
        return norms

    def _read_visits(self, file: Path, ids: Sequence[int]) -> list[tuple[int, float]]:
        """Read the visits of some examples from a file: id and norm."""
        check_file(file)
        metadata, names = self._parquet.read_metadata(file), ["example", "norm"]
        check_parquet(file, metadata, RunError)
        if not {*names} <= {*metadata.schema.names}:
            return []
        wanted = [("example", "in", list(ids))]
        table = self._parquet.read_table(file, columns=names, filters=wanted)
        return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))

    def flush(self) -> None:
        """Write the rows of all updates so far."""
        if not self._rows:
            return
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        columns = {
            name: self._make_array(torch.cat([row[name] for row in self._rows])) for name in names
        }
        file = self._folder / f"steps-{self._first:012d}-{self._next:012d}.parquet"
        try:
            check_folder(self._folder)
            make_folder(self._folder)
            with open_replacement(
                file, lambda new: self._announce({file: read_file_state(new)})
            ) as out:
                self._parquet.write_table(self._arrow.table(columns), out)
        except OSError as error:
            raise make_disk_error(file, error) from error
        self._rows.clear()
        self._first = self._next

    def _make_array(self, values: Tensor) -> Any:
        """Make a column of numbers [n], or of lists of k numbers [n, k]."""
        flat = values.numpy().ravel()
        if flat.dtype == bool:  # Arrow packs eight in a byte
            return self._arrow.array(flat)
        # From a buffer, since `array` would import pandas, which takes 50 MB.
        buffers = [None, self._arrow.py_buffer(flat)]
        kind = self._arrow.from_numpy_dtype(flat.dtype)
        column = self._arrow.Array.from_buffers(kind, len(flat), buffers)
        if values.ndim == 1:
            return column
        return self._arrow.FixedSizeListArray.from_arrays(column, values.shape[1])


def read_ledger(run: Path) -> dict[str, Any]:
    """Read all rows of a run as columns, but without projections, in the order of the updates.

    Raises:
        RunError: the run has no ledger, a file is damaged, or pyarrow is not installed.
    """
    arrow, parquet = _import_arrow()
    files = _find_files(run)
    with _explain_damage(run):
        table = arrow.concat_tables([_read_numbers(parquet, file) for file in files])
        _check_columns(run, table, arrow.types)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _read_numbers(parquet: Any, file: Path) -> Any:
    """Read all columns of a file but the projections."""
    names = parquet.read_schema(file).names
    others = [name for name in names if name != PROJECTION]
    return parquet.read_table(file, columns=others if PROJECTION in names else None)


def iterate_projections(run: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield step, epoch, example and projection [n, k] of all rows, file by file.

    A file has the updates from one checkpoint to the next, so it has been in memory before.

    Raises:
        RunError: the run has no projections, or as `read_ledger`.
    """
    arrow, parquet = _import_arrow()
    names, widths = [*_IDS, PROJECTION], set()
    for file in _find_files(run):
        with _explain_damage(run):
            if PROJECTION not in parquet.read_schema(file).names:
                raise RunError(
                    f"{run} keeps no projections of gradients, which say what examples are "
                    f"similar. Train with projections: --set observe.projections=512."
                )
            table = parquet.read_table(file, columns=names)
            _check_columns(run, table.drop_columns([PROJECTION]), arrow.types)
            column = table.column(PROJECTION).combine_chunks()
            widths.add(getattr(column.type, "list_size", 0))
            values = column.flatten() if max(widths) else column
            if len(widths) > 1 or values.type != arrow.float32() or values.null_count:
                raise arrow.ArrowException(f"{file} holds projections of type {column.type}")
        rows = {name: table.column(name).to_numpy() for name in _IDS}
        yield {**rows, PROJECTION: values.to_numpy().reshape(len(table), -1)}


def _find_files(run: Path) -> list[Path]:
    """Find the files of a ledger, and check them."""
    _, parquet = _import_arrow()
    check_folder(run / "ledger")
    files = [file for file, _, _ in _list_files(run / "ledger")]
    if not files:
        raise RunError(
            f"{run} has no ledger: there are no files in {run / 'ledger'}. Train with [observe] in "
            f"the recipe: --set observe.norms=true."
        )
    for file in files:
        check_file(file)
    _check_checksums(run)
    with _explain_damage(run):
        for file in files:
            check_parquet(file, parquet.read_metadata(file), RunError)
    return files


@contextmanager
def _explain_damage(run: Path) -> Iterator[None]:
    """Raise a RunError if pyarrow cannot read a file."""
    arrow, _ = _import_arrow()
    try:
        yield
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names may be any bytes
        raise RunError(
            f"the ledger of {run} cannot be read: {error}. Remove the file that is named, or "
            f"restore it from a copy."
        ) from error


def make_columns(step: int, epoch: int, gradient: Gradient) -> dict[str, Tensor]:
    """Build the ledger rows of a share, by column."""
    (term,) = gradient.terms.values() if len(gradient.terms) == 1 else (None,)
    size = len(next(iter(gradient.terms.values())).values)
    columns: dict[str, Tensor | None] = {
        "step": torch.full((size,), step),
        "epoch": torch.full((size,), epoch),
        "example": torch.arange(size) if gradient.ids is None else gradient.ids,
    }
    if term is not None and term.values.ndim == 1:
        columns |= {"loss": term.means, "count": term.weights.to(term.values)}
        columns |= {"coefficient": gradient.coefficients, **term.metrics}
    if (ledger := gradient.ledger) is not None:
        columns |= {"norm": ledger.norms, "alignment": ledger.alignment, "share": ledger.share}
        columns[PROJECTION] = None if ledger.projections is None else ledger.projections.float()
    return {n: column.detach().cpu().clone() for n, column in columns.items() if column is not None}


def rank_examples(columns: Mapping[str, NDArray[Any]], by: By, top: int) -> list[dict[str, Any]]:
    """List the examples with the largest value: id, number of visits, and all means.

    Args:
        columns: of the ledger, one row per visit, in the order of the updates.
        by: which value.
        top: maximum number of examples.

    Raises:
        RunError: the ledger does not hold the value.
    """
    if _COLUMN[by] not in columns:
        advice = "a loss with the metric accuracy" if by == "forgetting" else f"{_OPTION[by]}=true"
        raise RunError(
            f"the ledger cannot rank by {by!r}: it has no column {_COLUMN[by]!r}, only "
            f"{', '.join(columns)}. Train with {advice}."
        )
    values = average_visits(columns)
    order = np.argsort(-values[by], kind="stable")[:top]
    return [{name: column[i].item() for name, column in values.items()} for i in order]


def average_visits(columns: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Average the rows of each example: its id, the number of visits, and all means, by id."""
    ids, place, visits = np.unique(columns["example"], return_inverse=True, return_counts=True)
    values: dict[str, NDArray[Any]] = {"example": ids, "visits": visits}
    for name in ("loss", "norm", "share", "accuracy"):
        if name in columns:
            values[name] = np.bincount(place, columns[name]) / visits
    if "accuracy" in columns:
        values["forgetting"] = _count_forgetting(place, columns["accuracy"] > 0.5, len(ids))
    return values


def _count_forgetting(
    place: NDArray[np.int64], is_right: NDArray[np.bool_], num_examples: int
) -> NDArray[np.int64]:
    """Count how often each example goes from right to wrong."""
    order = np.argsort(place, kind="stable")  # visits of one example side by side, in time
    example, right = place[order], is_right[order]
    is_forgotten = (example[1:] == example[:-1]) & right[:-1] & ~right[1:]
    return np.bincount(example[1:][is_forgotten], minlength=num_examples)


def _check_checksums(run: Path) -> None:
    """Compare the ledger of a run with its checksums, if there are any."""
    checksums = Checksums.read(run)
    if checksums.is_old:
        return
    names = [name for name in checksums.files if name.startswith("ledger/")]
    damage = checksums.find_damage(names) + checksums.find_foreign(["ledger"])
    if damage:
        raise RunError("\n".join([f"the ledger of {run} cannot be read:", *damage]))


def _check_columns(run: Path, table: Any, types: Any) -> None:
    """Check that the columns are those of a ledger: numbers, and the ids of steps and examples."""
    names, kinds = table.column_names, (types.is_integer, types.is_floating, types.is_boolean)
    is_sound = len({*names}) == len(names) and all(
        column.null_count == 0
        and any(is_kind(kind) for is_kind in (kinds[:1] if name in _IDS else kinds))
        for name, kind, column in zip(names, table.schema.types, table.columns, strict=True)
    )
    if not (is_sound and {*_IDS} <= {*names}):
        raise RunError(
            f"{run / 'ledger'} holds other columns than a run writes: {shorten(names)} of "
            f"types {shorten(table.schema.types)}. Restore its files from a copy."
        )


def _list_files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Yield each whole file with its first step and the step after its last."""
    for file in sorted(folder.glob("steps-*.parquet")):
        if match := _NAME.fullmatch(file.name):
            yield file, int(match[1]), int(match[2])


def _import_arrow() -> tuple[Any, Any]:
    how = "anybatch[data]", "the ledger of a run is written by pyarrow", RunError
    return import_extra("pyarrow", *how), import_extra("pyarrow.parquet", *how)
