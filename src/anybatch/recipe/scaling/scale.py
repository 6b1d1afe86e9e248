"""What `anybatch scale` does to a recipe, and what building does to one with a reference size."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import nn

from anybatch.errors import AnybatchError, RecipeError
from anybatch.recipe.models import model_of
from anybatch.recipe.scaling.carry import carried, carry, carry_statistics, norms_of
from anybatch.recipe.scaling.case import case_of
from anybatch.recipe.scaling.changes import Carried, Rule
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.schema import Recipe

__all__ = ["at_its_size", "scale"]


def at_its_size(recipe: Recipe, model: nn.Module) -> Carried | None:
    """A recipe carried from `batch.reference_size` to `batch.size`, and its model with it.

    Args:
        recipe: as stated.
        model: that of the recipe; its running statistics get another momentum.

    Returns:
        What was carried; None where the recipe has no reference size.

    Raises:
        RecipeError: it cannot be carried.
    """
    batch = recipe.batch
    if batch.reference_size is None:
        return None
    found = carried(case_of(recipe, batch.size, "auto"), model)
    inside = carry_statistics(model, batch.size / batch.reference_size)
    return replace(found, changes=[*found.changes, *inside])


def scale(
    recipe: Recipe,
    *,
    batch_size: int | None,
    rule: Rule,
    reduction: Literal["sum", "mean"] | None,
    allow_code: bool,
) -> Carried:
    """A recipe with another reduction, at another batch size, or both.

    Raises:
        RecipeError: neither is asked for, or it cannot be done.
    """
    if batch_size is None and reduction is None:
        raise RecipeError("expected --batch-size N, --reduction sum or mean, or both.")
    done = Carried(recipe=recipe, rule="none", changes=[], warnings=[])
    if reduction is not None:
        done = convert(recipe, reduction)
    if batch_size is None:
        return done
    model, failed = _model(recipe, allow_code)
    found = carry(done.recipe, batch_size=batch_size, rule=rule, model=model)
    inside = list(_of_the_model(model, failed, recipe, batch_size))
    return replace(
        found,
        changes=[*done.changes, *found.changes],
        warnings=[*done.warnings, *found.warnings, *inside],
    )


def _model(recipe: Recipe, allow_code: bool) -> tuple[nn.Module | None, str]:
    """The recipe's model, or why it cannot be had here."""
    try:
        return model_of(recipe.model, recipe.run.seed, allow_code=allow_code), ""
    except AnybatchError as error:
        return None, str(error)


def _of_the_model(
    model: nn.Module | None, failed: str, recipe: Recipe, batch_size: int
) -> Iterator[str]:
    """What a recipe cannot say of its model."""
    if model is None:
        yield (
            f"the model cannot be built here, so that nothing is known of its batch normalisation: "
            f"state objective.grain if it has any ({failed})"
        )
    elif any(
        norm.momentum is not None and norm.running_mean is not None for norm in norms_of(model)
    ):
        old = recipe.batch.reference_size or recipe.batch.size
        yield (
            f"the momentum of batch normalisation's running statistics lies in the model, and no "
            f"key of a recipe states it. batch.reference_size = {old} with batch.size = "
            f"{batch_size} in the recipe of before carries it too"
        )
