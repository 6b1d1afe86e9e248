"""The data that a recipe's [data] states, and its parts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.data import DataSet, Splits, as_data_set, joined, sources, split
from anybatch.data.splits import cut
from anybatch.errors import AnybatchError, DataError, RecipeError
from anybatch.paths import check_local
from anybatch.recipe.models import drawing_from
from anybatch.recipe.names import called, looked_up
from anybatch.recipe.schema import DataSection, Recipe
from anybatch.training.batches import num_examples
from anybatch.training.data_fingerprint import check_data, data_fingerprint

__all__ = ["NOT_COMPARED", "compare_if_readable", "data_of", "fingerprint_of"]

NOT_COMPARED = "not compared"
"""Begins what `compare_if_readable` says of data that it could not compare."""


def data_of(
    section: DataSection, dtype: torch.dtype, *, allow_code: bool
) -> tuple[DataSet, Splits]:
    """The examples, and which of them to train on, to choose by and to judge by.

    Raises:
        RecipeError: a name or argument that is not expected; DataError: data that cannot be
            loaded or split so.
    """
    load = looked_up(section.name, sources, "data set", allow_code=allow_code)
    if section.name in sources:  # the user's own code may take addresses
        _check_local(section)

    def loaded(args: dict[str, Any]) -> DataSet:
        # Whatever the seed of the run, it is the same data set.
        with drawing_from(0), _memory_told(section):
            return as_data_set(called(load, args, "data.args"), section.name).to(dtype)

    _check_held_out(section)
    data = loaded(section.args)
    if isinstance(section.held_out, dict):
        others = loaded(section.args | section.held_out)
        with _memory_told(section):
            data, first = joined(data, others), data
        return data, _before(first, others, section)
    targets, is_class = _to_split_by(data)
    return data, split(
        targets,
        section.held_out,
        validation=section.validation,
        seed=section.split,
        stratify=section.stratify and is_class,
    )


def _check_held_out(section: DataSection) -> None:
    """See that what is held out is not what is trained on."""
    if isinstance(section.held_out, dict) and section.args | section.held_out == section.args:
        raise DataError(
            f"data.held_out = {section.held_out} loads the examples to train on once more, and a "
            f"model would be judged by what it was trained on. Name what differs, such as "
            f"held_out = {{ part = 'test' }}, or a fraction such as 0.2."
        )


@contextmanager
def _memory_told(section: DataSection) -> Iterator[None]:
    """Tell of data that do not fit in memory as such."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise DataError(
            f"the data {section.name!r} do not fit in memory. Convert them to Parquet, and set "
            f"data.name = 'parquet' and data.args.cache = true: rows are then read from files as "
            f"they are needed."
        ) from error


def _check_local(section: DataSection) -> None:
    held_out = section.held_out if isinstance(section.held_out, dict) else {}
    for key, args in (("args", section.args), ("held_out", held_out)):
        for name, value in args.items():
            check_local(value, f"data.{key}.{name}", RecipeError)


def fingerprint_of(section: DataSection, data: DataSet, parts: Splits) -> dict[str, Any]:
    """Compute the fingerprint of a data set and its splits: see `data_fingerprint`."""
    return data_fingerprint(
        data.columns, parts=parts._asdict(), files=_files_of(section), workers=section.workers
    )


def compare_if_readable(
    folder: Path, recipe: Recipe, before: dict[str, Any] | None, *, accept: bool
) -> str:
    """Compare a run's data with those that are here, for commands that do not need the data.

    Returns:
        In words, whether they are the same, or why they are not compared: the run has no
        fingerprint, or the data cannot be read here.

    Raises:
        RunError: other data, and they are not accepted.
    """
    if before is None:
        return f"{NOT_COMPARED}, as the run has no fingerprint of them"
    try:
        data, parts = data_of(recipe.data, getattr(torch, recipe.run.dtype), allow_code=False)
    except AnybatchError as error:
        return f"{NOT_COMPARED}: {error}"
    now = fingerprint_of(recipe.data, data, parts)
    return "others, accepted" if check_data(folder, before, now, accept=accept) else "the same"


def _files_of(section: DataSection) -> list[str]:
    """List the arguments of a data set that are files or folders."""
    held_out = section.held_out if isinstance(section.held_out, dict) else {}
    values = [*section.args.values(), *held_out.values()]
    return [value for value in values if isinstance(value, str) and os.path.exists(value)]


def _before(data: DataSet, others: DataSet, section: DataSection) -> Splits:
    """All that was loaded first to train on or for validation, the others held out."""
    targets, is_class = _to_split_by(data)
    parts = cut(
        targets, 0.0, section.validation, seed=section.split, stratify=section.stratify and is_class
    )
    if not len(parts.train) or (section.validation and not len(parts.validation)):
        raise DataError(
            f"data.validation = {section.validation} of {len(targets)} examples leaves "
            f"{len(parts.train)} to train on and {len(parts.validation)} for validation, expected "
            f"some of both."
        )
    first = len(targets)
    ids = torch.arange(first, first + num_examples(others.columns))
    return parts._replace(held_out=ids)


def _to_split_by(data: DataSet) -> tuple[Tensor, bool]:
    """Targets [N], and whether they are classes; zeros where nothing can be told."""
    found, size = data.targets, num_examples(data.columns)
    if found is None or len(found) != size or found.ndim != 1 or found.is_floating_point():
        return torch.zeros(size, dtype=torch.long), False
    return found, True
