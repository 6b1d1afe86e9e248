"""Build the objective of a recipe: loss, reductions and penalties."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from anybatch import reductions, zoo
from anybatch.errors import RecipeError
from anybatch.objective import Objective
from anybatch.penalties import L1, L2, Penalties
from anybatch.recipe.names import call_function, check_signature, find_function
from anybatch.recipe.schema import ObjectiveSection

__all__ = ["build_objective"]

PENALTIES = {"L1": L1, "L2": L2}
REDUCTIONS: dict[str, Callable[..., reductions.Reduction]] = {
    "mean": reductions.Mean,
    "sum": reductions.Sum,
    "max": reductions.Max,
    "top_fraction": reductions.TopFraction,
    "tilted": reductions.Tilted,
    "group_dro": reductions.GroupDRO,
}


def build_objective(section: ObjectiveSection, *, allow_code: bool) -> Objective:
    """Build the objective of a recipe.

    Raises:
        RecipeError: a wrong name, argument or form.
    """
    loss = find_function(section.loss, zoo.losses, "loss", allow_code=allow_code)
    check_signature(loss, "objective.loss", "model", "batch")
    penalties = tuple(PENALTIES[p.kind](p.strength, p.on, p.name) for p in section.penalty)
    return Objective(
        loss,
        reduction=_build_reductions(section.reduction, allow_code),
        penalty=Penalties(penalties) if penalties else None,
        grain=section.grain,
    )


def _build_reductions(value: str | Mapping[str, Any], allow_code: bool) -> Any:
    """Build one reduction, or one for each term of the loss."""
    key = "objective.reduction"
    if isinstance(value, str) or "name" in value:
        return _build_reduction(_read_reduction(value, key), key, allow_code)
    terms = {name: _read_reduction(one, f"{key}.{name}") for name, one in value.items()}
    return {name: _build_reduction(a, f"{key}.{name}", allow_code) for name, a in terms.items()}


def _read_reduction(value: Any, key: str) -> dict[str, Any]:
    """Read name, scale and arguments of a reduction; `key` is its place."""
    args = {"name": value} if isinstance(value, str) else value
    if not isinstance(args, Mapping) or not isinstance(args.get("name"), str):
        raise RecipeError(
            f"{key}: expected a name such as 'mean', or {{name = 'tilted', t = 2.0}} with its "
            f"arguments and perhaps a scale, got {value!r}. Without a name, each key is a term of "
            f"the loss, with a reduction of its own."
        )
    return dict(args)


def _build_reduction(args: dict[str, Any], key: str, allow_code: bool) -> reductions.Reduction:
    name, scale = args.pop("name"), args.pop("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise RecipeError(f"{key}.scale: expected a number, got {scale!r}.")
    if not math.isfinite(scale) or scale == 0:
        raise RecipeError(
            f"{key}.scale = {scale!r}. It should be a finite number other than 0: nothing is "
            f"learned from a loss times 0. To leave a term out, do not return it."
        )
    function = find_function(name, REDUCTIONS, "reduction", allow_code=allow_code)
    if isinstance(function, type):
        reduction = reductions.as_reduction(call_function(function, args, key))
    else:
        check_signature(function, key, "losses", **args)
        reduction = reductions.as_reduction(partial(function, **args) if args else function)
    return reduction if scale == 1.0 else scale * reduction
