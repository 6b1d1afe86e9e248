"""What `anybatch scale` does to a recipe, and what building does to one with a reference size."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from torch import nn

from anybatch.errors import AnybatchError, RecipeError
from anybatch.recipe.models import build_model
from anybatch.recipe.scaling.case import make_case
from anybatch.recipe.scaling.changes import Rule, ScaledRecipe
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.scaling.rescale import (
    collect_state,
    find_batch_norms,
    rescale,
    rescale_statistics,
)
from anybatch.recipe.schema import Recipe

__all__ = ["rescale_to_batch_size", "scale"]


def rescale_to_batch_size(recipe: Recipe, model: nn.Module) -> ScaledRecipe | None:
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
    found = collect_state(make_case(recipe, batch.size, "auto"), model)
    inside = rescale_statistics(model, batch.size / batch.reference_size)
    return replace(found, changes=[*found.changes, *inside])


def scale(
    recipe: Recipe,
    *,
    batch_size: int | None,
    rule: Rule,
    reduction: Literal["sum", "mean"] | None,
    allow_code: bool,
) -> ScaledRecipe:
    """A recipe with another reduction, at another batch size, or both.

    Raises:
        RecipeError: neither is asked for, or it cannot be done.
    """
    if batch_size is None and reduction is None:
        raise RecipeError("expected --batch-size N, --reduction sum or mean, or both.")
    done = ScaledRecipe(recipe=recipe, rule="none", changes=[], warnings=[])
    if reduction is not None:
        done = convert(recipe, reduction)
    if batch_size is None:
        return done
    model, failed = _try_model(recipe, allow_code)
    found = rescale(done.recipe, batch_size=batch_size, rule=rule, model=model)
    inside = list(_warn_of_model(model, failed, recipe, batch_size))
    return replace(
        found,
        changes=[*done.changes, *found.changes],
        warnings=[*done.warnings, *found.warnings, *inside],
    )


def _try_model(recipe: Recipe, allow_code: bool) -> tuple[nn.Module | None, str]:
    """The recipe's model, or why it cannot be had here."""
    try:
        return build_model(recipe.model, recipe.run.seed, allow_code=allow_code), ""
    except AnybatchError as error:
        return None, str(error)


def _warn_of_model(
    model: nn.Module | None, failed: str, recipe: Recipe, batch_size: int
) -> Iterator[str]:
    """What a recipe cannot say of its model."""
    if model is None:
        yield (
            f"the model cannot be built here, so that nothing is known of its batch normalisation: "
            f"state objective.grain if it has any ({failed})"
        )
    elif any(
        norm.momentum is not None and norm.running_mean is not None
        for norm in find_batch_norms(model)
    ):
        old = recipe.batch.reference_size or recipe.batch.size
        yield (
            f"the momentum of batch normalisation's running statistics lies in the model, and no "
            f"key of a recipe states it. batch.reference_size = {old} with batch.size = "
            f"{batch_size} in the recipe of before carries it too"
        )
