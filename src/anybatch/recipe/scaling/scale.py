"""Rescale a recipe for `anybatch scale`, and where `batch.reference_size` asks for it."""

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
    find_batch_norms,
    rescale,
    rescale_case,
    rescale_statistics,
)
from anybatch.recipe.schema import Recipe

__all__ = ["rescale_to_batch_size", "scale"]


def rescale_to_batch_size(recipe: Recipe, model: nn.Module) -> ScaledRecipe | None:
    """Rescale a recipe from `batch.reference_size` to `batch.size`.

    Args:
        model: its model. Its running statistics get another momentum.

    Returns:
        The rescaled recipe; None if there is no reference size.

    Raises:
        RecipeError: it cannot be rescaled.
    """
    batch = recipe.batch
    if batch.reference_size is None:
        return None
    scaled = rescale_case(make_case(recipe, batch.size, "auto"), model)
    in_model = rescale_statistics(model, batch.size / batch.reference_size)
    return replace(scaled, changes=[*scaled.changes, *in_model])


def scale(
    recipe: Recipe,
    *,
    batch_size: int | None,
    rule: Rule,
    reduction: Literal["sum", "mean"] | None,
    allow_code: bool,
) -> ScaledRecipe:
    """Change the reduction of a recipe, its batch size, or both.

    Raises:
        RecipeError: neither is given, or it cannot be done.
    """
    if batch_size is None and reduction is None:
        raise RecipeError("nothing to do. Set --batch-size N, --reduction sum or mean, or both.")
    converted = ScaledRecipe(recipe=recipe, rule="none", changes=[], warnings=[])
    if reduction is not None:
        converted = convert(recipe, reduction)
    if batch_size is None:
        return converted
    problem, model = "", None
    try:
        model = build_model(recipe.model, recipe.run.seed, allow_code=allow_code)
    except AnybatchError as error:
        problem = str(error)
    scaled = rescale(converted.recipe, batch_size=batch_size, rule=rule, model=model)
    in_model = list(_warn_of_model(model, problem, recipe, batch_size))
    return replace(
        scaled,
        changes=[*converted.changes, *scaled.changes],
        warnings=[*converted.warnings, *scaled.warnings, *in_model],
    )


def _warn_of_model(
    model: nn.Module | None, problem: str, recipe: Recipe, batch_size: int
) -> Iterator[str]:
    """Warn of batch normalisation, whose momentum is no key of the recipe."""
    if model is None:
        yield (
            f"the model cannot be built here, so nothing is known of its batch normalisation: "
            f"state objective.grain if it has any ({problem})"
        )
    elif any(
        norm.momentum is not None and norm.running_mean is not None
        for norm in find_batch_norms(model)
    ):
        old = recipe.batch.reference_size or recipe.batch.size
        yield (
            f"the momentum of batch normalisation's running statistics is in the model, and no "
            f"key of a recipe states it. To rescale it too, set batch.reference_size = {old} and "
            f"batch.size = {batch_size} in the original recipe"
        )
