"""Load the data of a recipe, and split them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anybatch.data import DataSet, Splits, as_data_set, concatenate, sources, split
from anybatch.data.splits import assign_splits
from anybatch.errors import AnybatchError, DataError, RecipeError
from anybatch.examples import count_examples
from anybatch.paths import check_local
from anybatch.recipe.models import use_seed
from anybatch.recipe.names import call_function, find_function
from anybatch.recipe.schema import DataSection, Recipe
from anybatch.runs.data_fingerprint import check_data, compute_fingerprint

__all__ = ["NOT_COMPARED", "compare_run_data", "fingerprint_data", "load_data"]

NOT_COMPARED = "not compared"
"""Beginning of what `compare_run_data` says of data that it could not compare."""


def load_data(
    section: DataSection, dtype: torch.dtype, *, allow_code: bool
) -> tuple[DataSet, Splits]:
    """Load the examples, and split them into train, validation and held-out ids.

    Raises:
        RecipeError: a wrong name or argument; DataError: data that cannot be loaded or split so.
    """
    load = find_function(section.name, sources, "data set", allow_code=allow_code)
    if section.name in sources:  # the user's own code may take URLs
        for key, args in (("args", section.args), ("held_out", _get_held_out(section))):
            for name, value in args.items():
                check_local(value, f"data.{key}.{name}", RecipeError)

    def load_part(args: dict[str, Any]) -> DataSet:
        # Seed 0, so that the data set does not depend on the seed of the run.
        with use_seed(0), _explain_memory(section):
            return as_data_set(call_function(load, args, "data.args"), section.name).to(dtype)

    if isinstance(section.held_out, dict) and section.args | section.held_out == section.args:
        raise DataError(
            f"data.held_out = {section.held_out} loads the examples to train on once more, and a "
            f"model would be judged by what it was trained on. Name what differs, such as "
            f"held_out = {{ part = 'test' }}, or a fraction such as 0.2."
        )
    data = load_part(section.args)
    if isinstance(section.held_out, dict):
        held_out = load_part(section.args | section.held_out)
        with _explain_memory(section):
            return concatenate(data, held_out), _split_validation(data, held_out, section)
    targets, has_classes = _get_targets(data)
    return data, split(
        targets,
        section.held_out,
        validation=section.validation,
        seed=section.split,
        stratify=section.stratify and has_classes,
    )


def _get_held_out(section: DataSection) -> dict[str, Any]:
    """Return the arguments that load the held-out data; none where these are a fraction."""
    return section.held_out if isinstance(section.held_out, dict) else {}


@contextmanager
def _explain_memory(section: DataSection) -> Iterator[None]:
    """Turn an error about memory into a message about the data."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise DataError(
            f"the data {section.name!r} do not fit in memory. Convert them to Parquet, and set "
            f"data.name = 'parquet' and data.args.cache = true. Rows are then read from files as "
            f"they are needed."
        ) from error


def fingerprint_data(section: DataSection, data: DataSet, splits: Splits) -> dict[str, Any]:
    """Compute the fingerprint of a data set and its splits: see `data_fingerprint`."""
    values = [*section.args.values(), *_get_held_out(section).values()]
    files = [value for value in values if isinstance(value, str) and os.path.exists(value)]
    parts = splits._asdict()
    return compute_fingerprint(data.columns, parts=parts, files=files, workers=section.workers)


def compare_run_data(
    folder: Path,
    recipe: Recipe,
    fingerprint: dict[str, Any] | None,
    *,
    accept: bool,
    allow_code: bool = False,
) -> str:
    """Compare the data here with those of a run, for commands that do not need the data.

    Args:
        fingerprint: that of the run's data.

    Returns:
        In words, whether they are the same, or why they are not compared: the run has no
        fingerprint, or the data cannot be read here.

    Raises:
        RunError: other data, and they are not accepted.
    """
    if fingerprint is None:
        return f"{NOT_COMPARED}, as the run has no fingerprint of them"
    try:
        dtype = getattr(torch, recipe.run.dtype)
        data, splits = load_data(recipe.data, dtype, allow_code=allow_code)
    except AnybatchError as error:
        return f"{NOT_COMPARED}: {error}"
    now = fingerprint_data(recipe.data, data, splits)
    return "others, accepted" if check_data(folder, fingerprint, now, accept=accept) else "the same"


def _split_validation(data: DataSet, held_out: DataSet, section: DataSection) -> Splits:
    """Split data into train and validation. The held-out ids follow them."""
    targets, has_classes = _get_targets(data)
    stratify = section.stratify and has_classes
    splits = assign_splits(targets, 0.0, section.validation, seed=section.split, stratify=stratify)
    if not len(splits.train) or (section.validation and not len(splits.validation)):
        raise DataError(
            f"data.validation = {section.validation} of {len(targets)} examples leaves "
            f"{len(splits.train)} to train on and {len(splits.validation)} for validation. Both "
            f"need at least one."
        )
    first = len(targets)
    return splits._replace(held_out=torch.arange(first, first + count_examples(held_out.columns)))


def _get_targets(data: DataSet) -> tuple[Tensor, bool]:
    """Return targets [N] to stratify by, and whether they are classes; zeros if they are not."""
    targets, size = data.targets, count_examples(data.columns)
    if targets is None or len(targets) != size or targets.ndim != 1 or targets.is_floating_point():
        return torch.zeros(size, dtype=torch.long), False
    return targets, True
