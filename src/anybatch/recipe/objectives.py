"""The objective that a recipe's [objective] states."""

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
_KEY = "objective.reduction"


def build_objective(section: ObjectiveSection, *, allow_code: bool) -> Objective:
    """Loss, reductions and penalties by their names.

    Raises:
        RecipeError: a name, argument or form that is not expected.
    """
    loss = find_function(section.loss, zoo.losses, "loss", allow_code=allow_code)
    check_signature(loss, "objective.loss", "model", "batch")
    terms = tuple(PENALTIES[p.kind](p.strength, p.on, p.name) for p in section.penalty)
    return Objective(
        loss,
        reduction=_build_reductions(section.reduction, allow_code),
        penalty=Penalties(terms) if terms else None,
        grain=section.grain,
    )


def _build_reductions(given: str | Mapping[str, Any], allow_code: bool) -> Any:
    """One reduction, or one a term."""
    if isinstance(given, str) or "name" in given:
        return _build_reduction(_read_reduction(given, _KEY), allow_code, _KEY)
    stated = {term: _read_reduction(one, f"{_KEY}.{term}") for term, one in given.items()}
    return {
        term: _build_reduction(one, allow_code, f"{_KEY}.{term}") for term, one in stated.items()
    }


def _read_reduction(given: Any, where: str) -> dict[str, Any]:
    """A reduction's name with its arguments and scale."""
    stated = {"name": given} if isinstance(given, str) else given
    if not isinstance(stated, Mapping) or not isinstance(stated.get("name"), str):
        raise RecipeError(
            f"{where}: expected a name such as 'mean', or {{name = 'tilted', t = 2.0}} with its "
            f"arguments and perhaps a scale, got {given!r}. Without a name, each key is a term of "
            f"the loss, with a reduction of its own."
        )
    return dict(stated)


def _build_reduction(stated: dict[str, Any], allow_code: bool, where: str) -> reductions.Reduction:
    name, scale = stated.pop("name"), stated.pop("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise RecipeError(f"{where}.scale: expected a number, got {scale!r}.")
    if not math.isfinite(scale) or scale == 0:
        raise RecipeError(
            f"{where}.scale = {scale!r}. It should be a finite number other than 0: nothing is "
            f"learned from a loss times 0. To leave a term out, do not return it."
        )
    found = find_function(name, REDUCTIONS, "reduction", allow_code=allow_code)
    if isinstance(found, type):
        reduction = reductions.as_reduction(call_function(found, stated, where))
    else:
        check_signature(found, where, "losses", **stated)
        reduction = reductions.as_reduction(partial(found, **stated) if stated else found)
    return reduction if scale == 1.0 else scale * reduction
