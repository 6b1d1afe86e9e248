"""The data that a recipe's [data] states, and its parts."""

from typing import Any

import torch
from torch import Tensor

from anybatch.data import DataSet, Splits, as_data_set, joined, sources, split
from anybatch.data.splits import cut
from anybatch.errors import DataError
from anybatch.recipe.models import drawing_from
from anybatch.recipe.names import called, looked_up
from anybatch.recipe.schema import DataSection
from anybatch.training.batches import num_examples

__all__ = ["data_of"]


def data_of(
    section: DataSection, dtype: torch.dtype, *, allow_code: bool
) -> tuple[DataSet, Splits]:
    """The examples, and which of them to train on, to choose by and to judge by.

    Raises:
        RecipeError: a name or argument that is not expected; DataError: data that cannot be
            loaded or split so.
    """
    load = looked_up(section.name, sources, "data set", allow_code=allow_code)

    def loaded(args: dict[str, Any]) -> DataSet:
        with drawing_from(0):  # whatever the seed of the run: it is the same data set
            return as_data_set(called(load, args, "data.args"), section.name).to(dtype)

    data = loaded(section.args)
    if isinstance(section.held_out, dict):
        others = loaded(section.args | section.held_out)
        return joined(data, others), _before(data, others, section)
    targets, is_class = _to_split_by(data)
    return data, split(
        targets,
        section.held_out,
        validation=section.validation,
        seed=section.split,
        stratify=section.stratify and is_class,
    )


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
