"""The ledger of a run on disk: one row an example a visit, as a Parquet data set.

    RUN/ledger/steps-000000000000-000000000123.parquet    the rows of the updates 0 .. 122

Columns: step, epoch, example (its id), then loss, count, coefficient, each metric, and norm,
alignment and share where they were asked for. A file is written with each checkpoint, whole or not
at all, so that a resumed run, which makes later steps again, has each row once.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.errors import RunError
from anybatch.extras import import_extra
from anybatch.gradient import Gradient
from anybatch.limits import check_parquet, shorten
from anybatch.training.checksums import Changing, Checksums, no_checksums, state_of
from anybatch.training.disk import check_file, check_folder, make_folder, replacing

__all__ = ["LedgerFiles", "columns_of", "read_ledger"]

_IDS = ("step", "epoch", "example")
_NAME = re.compile(r"steps-(\d{12})-(\d{12})\.parquet")


class LedgerFiles:
    """The files of a run, opened to add to them.

    Raises:
        RunError: pyarrow is not installed.
    """

    def __init__(self, folder: Path, changing: Changing = no_checksums) -> None:
        self._changing = changing
        self._arrow, self._parquet = _arrow()
        self._folder = folder
        self._rows: list[dict[str, Tensor]] = []  # a dict of columns for each share
        self._first = self._next = 0  # the steps of the rows: from the one to before the other

    def begin(self, step: int) -> None:
        """Drop the rows of this step and later ones, which are made again."""
        later = [file for file, _, stop in _files(self._folder) if stop > step]
        with self._changing(dict.fromkeys(later)):
            for file in later:
                file.unlink()
        self._first = self._next = step

    def add(self, step: int, shares: Iterable[dict[str, Tensor]]) -> None:
        """Take in an update: the columns of its shares, in order."""
        self._rows += [columns for columns in shares if len(columns["step"])]
        self._next = step + 1

    def flush(self) -> None:
        """Bring the rows of all updates so far to the disk.

        Raises:
            RunError: a disk that refuses.
        """
        if not self._rows:
            return
        step = self._next
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        columns = {name: torch.cat([row[name] for row in self._rows]).numpy() for name in names}
        file = self._folder / f"steps-{self._first:012d}-{step:012d}.parquet"
        try:
            check_folder(self._folder)
            make_folder(self._folder)
            with replacing(file, lambda new: self._changing({file: state_of(new)})) as out:
                self._parquet.write_table(self._arrow.table(columns), out)
        except OSError as error:
            raise RunError(
                f"could not write {file}: {error}. The checkpoints are untouched. Free some space "
                f"or check the disk, and resume."
            ) from error
        self._rows.clear()
        self._first = step


def read_ledger(run: Path) -> dict[str, Any]:
    """All rows of a run as columns, in the order of the updates.

    Raises:
        RunError: a run without a ledger, a damaged file, or pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    check_folder(run / "ledger")
    files = [file for file, _, _ in _files(run / "ledger")]
    if not files:
        raise RunError(
            f"{run} has no ledger, expected files in {run / 'ledger'}. Train with [observe] in the "
            f"recipe: --set observe.norms=true."
        )
    for file in files:
        check_file(file)
    _check(run)
    try:
        for file in files:
            check_parquet(file, parquet.read_metadata(file), RunError)
        table = arrow.concat_tables([parquet.read_table(file) for file in files])
        _check_columns(run, table, arrow.types)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names may be any bytes
        raise RunError(
            f"the ledger of {run} cannot be read: {error}. Remove the file that is named, or "
            f"restore it from a copy."
        ) from error
    return {name: table.column(name).to_numpy() for name in table.column_names}


def columns_of(step: int, epoch: int, gradient: Gradient) -> dict[str, Tensor]:
    """The rows of a share, by column."""
    (term,) = gradient.terms.values() if len(gradient.terms) == 1 else (None,)
    size = len(next(iter(gradient.terms.values())).values)
    ids = torch.arange(size) if gradient.ids is None else gradient.ids
    found = {
        "step": torch.full((size,), step),
        "epoch": torch.full((size,), epoch),
        "example": ids,
    }
    if term is not None and term.values.ndim == 1:
        found |= {"loss": term.means, "count": term.weights.to(term.values)}
        found |= {"coefficient": gradient.coefficients, **term.metrics}
    if gradient.ledger is not None:
        asked = {
            "norm": gradient.ledger.norms,
            "alignment": gradient.ledger.alignment,
            "share": gradient.ledger.share,
        }
        found |= {name: tensor for name, tensor in asked.items() if tensor is not None}
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def _check(run: Path) -> None:
    """Compare the ledger of a run with its checksums, if there are any."""
    checksums = Checksums.read(run)
    if checksums.is_old:
        return
    listed = [name for name in checksums.files if name.startswith("ledger/")]
    wrong = checksums.find_damage(listed) + checksums.find_foreign(["ledger"])
    if wrong:
        raise RunError("\n".join([f"the ledger of {run} cannot be read:", *wrong]))


def _check_columns(run: Path, table: Any, types: Any) -> None:
    """See that the columns are those of a ledger: numbers, with the ids of updates and examples."""
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


def _files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Each whole file, with its first step and the one after its last."""
    for file in sorted(folder.glob("steps-*.parquet")):
        if match := _NAME.fullmatch(file.name):
            yield file, int(match[1]), int(match[2])


def _arrow() -> tuple[Any, Any]:
    how = "anybatch[data]", "the ledger of a run is written by pyarrow", RunError
    return import_extra("pyarrow", *how), import_extra("pyarrow.parquet", *how)
