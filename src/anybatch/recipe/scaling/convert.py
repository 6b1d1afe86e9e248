"""Convert a recipe from Mean to Sum and back, at one batch size: the same path, by constants.

    Sum = N Mean, and so are the gradients;    x_sum = N^p x_mean,    N = B n

p is the power of each number, see `case`; B the batch size, n the count of each example: 1, or the
number of its tokens, or the total that Mean states. Exact, up to rounding, where every batch has
the same N.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from anybatch.data import load_text
from anybatch.errors import RecipeError
from anybatch.recipe.code import is_code
from anybatch.recipe.scaling.case import KINDS, OptimizerKind, find_kind, find_numbers, list_terms
from anybatch.recipe.scaling.changes import Draft, Path, ScaledRecipe, check_number
from anybatch.recipe.schema import Recipe

__all__ = ["convert"]

RATES: tuple[Path, ...] = (("optimizer", "lr"), ("schedule", "end"), ("schedule", "warm_up_start"))
CLIP: Path = ("optimizer", "clip_norm")
WHY = {
    -1: "it multiplies the gradient",
    1: "it is added to the gradient, or compared with it",
    2: "it is added to the gradient's square",
}


def convert(recipe: Recipe, reduction: Literal["sum", "mean"]) -> ScaledRecipe:
    """Convert a recipe to the other reduction, such that training makes the same path.

    Example:
        >>> from anybatch.recipe import find_recipe, read_recipe
        >>> recipe = read_recipe(find_recipe("lenet-digits"))
        >>> summed = convert(recipe, "sum").recipe
        >>> summed.optimizer.lr * recipe.batch.size == recipe.optimizer.lr
        True

    Args:
        recipe: the recipe. Every term of its reduction is mean, or every one is sum.
        reduction: the new one.

    Raises:
        RecipeError: another reduction, an unknown optimiser, or batches whose counts differ, so
            that no constant converts one to the other.
    """
    if reduction not in ("sum", "mean"):
        raise RecipeError(f"reduction = {reduction!r}. Expected 'sum' or 'mean'.")
    terms = list(list_terms(recipe.objective.reduction))
    names = {name for _, name, _ in terms}
    if names not in ({"mean"}, {"sum"}):
        raise RecipeError(
            f"objective.reduction is {' and '.join(sorted(names))}. Only mean alone or sum alone "
            f"can be converted: only these two are each other times a constant."
        )
    kind = find_kind(recipe.optimizer)
    if kind is None:
        raise RecipeError(
            f"optimizer.name = {recipe.optimizer.name!r}: nobody knows how its numbers depend on "
            f"the size of the gradient. They are known for {', '.join(KINDS)}."
        )
    draft = Draft(recipe)
    if names != {reduction}:
        count = (recipe.batch.reference_size or recipe.batch.size) * _find_count(recipe, terms)
        for path, _, args in terms:
            others = {key: value for key, value in args.items() if key not in ("name", "total")}
            new = others | {"name": reduction} if others else reduction
            draft.set(path, new, reduction, f"a sum is {count} times the mean")
        _convert_numbers(draft, kind, count, reduction)
        draft.warnings.extend(_list_warnings(recipe))
    return draft.finish(reduction)


def _convert_numbers(draft: Draft, kind: OptimizerKind, count: float, reduction: str) -> None:
    """Multiply or divide each number of power p by count^p."""
    sign = 1 if reduction == "sum" else -1
    numbers: dict[Path, tuple[Any, int]] = {
        path: (draft.get(path), kind.powers.get("lr", 0)) for path in RATES
    }
    numbers |= {path: (draft.get(path), 1) for path in (CLIP, *draft.list_penalties())}
    for name, power in kind.powers.items():
        if name != "lr":
            values = find_numbers(draft.recipe.optimizer, name)
            numbers |= {path: (old, power) for path, old in values}
    for path, (old, power) in numbers.items():
        if old is not None:
            factor = count ** abs(power)
            is_product = sign * power > 0
            new, how = (old * factor, "times") if is_product else (old / factor, "divided by")
            why = f"{how} {factor}: {WHY[power]}" if power else ""
            draft.set(path, new, reduction, why, default=old)


def _find_count(recipe: Recipe, terms: Sequence[tuple[Path, str, Mapping[str, Any]]]) -> float:
    """Find the count n of every example, or the mean count that all terms state as their total."""
    totals = {args.get("total") for _, _, args in terms}
    if len(totals) > 1:
        raise RecipeError(
            f"the terms of objective.reduction have the totals {sorted(map(str, totals))}, and no "
            f"one constant converts them to a sum. Give all terms the same total."
        )
    if None not in totals and recipe.order.name != "growing":
        return float(check_number(("objective", "reduction", "total"), totals.pop()))
    data, objective = recipe.data, recipe.objective
    varies = "no constant converts the mean of such batches to their sum. Keep the reduction."
    if "weights" in data.args and recipe.order.name != "weighted":
        raise RecipeError(
            f"data.args.weights = {data.args['weights']!r}: the weights of a batch add up to "
            f"another sum each time, and {varies}"
        )
    if recipe.order.name == "growing":
        raise RecipeError(f"order.name = 'growing': batches differ in size, and {varies}")
    if objective.loss != "token_cross_entropy":
        return 1
    if data.name != "text":
        raise RecipeError(
            f"objective.loss = 'token_cross_entropy' on data.name = {data.name!r}: batches differ "
            f"in their number of tokens, and {varies}"
        )
    return int(data.args.get("length", inspect.signature(load_text).parameters["length"].default))


def _list_warnings(recipe: Recipe) -> Iterator[str]:
    if recipe.batch.last == "keep":
        yield (
            "a last batch of fewer examples is not converted by these constants. The path is the "
            "same only if batch.size divides the data, or with batch.last = 'carry' or 'drop'"
        )
    code = [name for name in (recipe.objective.loss, recipe.data.name) if is_code(name)]
    if code:
        yield (
            f"{', '.join(code)}: code of yours. The conversion assumes that it counts each example "
            f"once. If it returns counts or weights that differ, no constant converts it"
        )
