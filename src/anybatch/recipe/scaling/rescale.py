"""Rescale a recipe to another batch size: which rule changes which key, and why.

    k = new size / old size

Under Sum the gradient grows with the batch. Its recipe is rescaled as that of Mean which makes the
same path: each number x of power p (see `case`) is multiplied by k^p as well.

Batch normalisation holds more, inside the model: the momentum m of its running statistics,

    s <- (1 - m) s + m s_batch,    one update a batch;    m' = 1 - (1 - m)^k

The batch whose statistics normalise an example is the grain. Without a grain it is the whole
batch, which would be another function of the examples at another size. So the old batch size
becomes the grain.
"""

import inspect
import math
from typing import Any

from torch import nn

from anybatch._torch import BATCH_NORMS
from anybatch.batch import is_count
from anybatch.errors import RecipeError
from anybatch.recipe.orders import ORDERS
from anybatch.recipe.scaling import rules
from anybatch.recipe.scaling.case import ADASCALE, Case, find_numbers, list_terms, make_case
from anybatch.recipe.scaling.changes import Change, Draft, Path, Rule, ScaledRecipe
from anybatch.recipe.scaling.conditions import list_warnings
from anybatch.recipe.schema import Recipe

__all__ = ["find_batch_norms", "rescale", "rescale_case", "rescale_statistics"]

WHY = {
    "linear": "k lr: one update in place of k (Goyal et al. 2017)",
    "sqrt": "sqrt(k) lr: the noise that divides it falls by sqrt(k) (Malladi et al. 2022)",
    "half-life": "k lr (1 - m^k) / (1 - m): what a gradient moves in all, times k",
    # other rules leave the rate as it is
}


def rescale(
    recipe: Recipe, *, batch_size: int, rule: Rule = "auto", model: nn.Module | None = None
) -> ScaledRecipe:
    """Rescale a recipe to another batch size.

    The keys of a recipe with `batch.reference_size` are stated for that size. They are rescaled
    from there, and the new recipe has no reference size.

    Example:
        >>> from anybatch.recipe import find_recipe, read_recipe
        >>> recipe = read_recipe(find_recipe("lenet-digits"))
        >>> scaled = rescale(recipe, batch_size=2 * recipe.batch.size)
        >>> scaled.recipe.optimizer.lr / recipe.optimizer.lr
        2.0

    Args:
        batch_size: new number of examples of an update.
        rule: for the learning rate, and what goes with it; auto: that of `batch.scaling`, else the
            optimiser's own. "none" leaves the rate and what belongs to it (momentum, betas,
            epsilon, clip norm). It rescales what else is counted in updates, AdamW's decay too.
        model: its model, to see whether it normalises batches. It is not changed.

    Raises:
        RecipeError: a wrong size or rule, a reduction that is another objective at another size,
            or an optimiser without a rule.
    """
    case = make_case(recipe, batch_size, rule)
    if case.rule == ADASCALE:
        raise RecipeError(
            "batch.scaling = 'adascale' measures the rate in training, so no recipe can state it. "
            "Train with batch.size = N instead, or name another rule."
        )
    return rescale_case(case, model)


def rescale_case(case: Case, model: nn.Module | None) -> ScaledRecipe:
    """Rescale a recipe that was checked."""
    draft = Draft(case.recipe)
    draft.tree["batch"] |= {"reference_size": None, "scaling": "auto", "size": case.old}
    if case.new != case.old:
        draft.set(("batch", "size"), case.new, "asked", f"k = {case.k:g}")
        _rescale_rates(draft, case)
        _rescale_averages(draft, case)
        _rescale_decay(draft, case)
        _rescale_sizes(draft, case)
        _rescale_counts(draft, case)
        if model is not None and find_batch_norms(model):
            _set_grain(draft, case)
        draft.warnings.extend(list_warnings(case))
    return draft.finish(case.rule)


def _rate_factor(case: Case, momentum: float) -> float:
    """Return the factor of the rate under Mean."""
    if case.rule == "linear":
        return rules.linear(1.0, case.k)
    if case.rule == "sqrt":
        return rules.square_root(1.0, case.k)
    if case.rule == "half-life":
        return rules.half_life(1.0, momentum, case.k)[0]
    return 1.0


def _rescale_rates(draft: Draft, case: Case) -> None:
    """Rescale lr and every rate of the schedule."""
    section, schedule = case.recipe.optimizer, case.recipe.schedule
    if case.kind is None or case.rule == "none":
        return
    momenta = dict(find_numbers(section, "momentum"))
    momentum = momenta.get(("optimizer", "args", "momentum"), 0.0)
    mean_factor = _rate_factor(case, momentum)
    factor = mean_factor * case.sum_factor(case.kind.powers.get("lr", 0))
    lr = section.lr * factor
    draft.set(("optimizer", "lr"), lr, case.rule, WHY.get(case.rule, ""))
    draft.map(("schedule", "end"), lambda end: end * factor, case.rule, "as optimizer.lr")
    if case.rule in ("linear", "half-life"):
        why = "the warm-up starts from the old rate"
        start = min(schedule.warm_up_start * factor / case.k, lr)
    else:
        why, start = "as optimizer.lr", schedule.warm_up_start * factor
    draft.set(("schedule", "warm_up_start"), start, case.rule, why)
    if case.rule == "half-life":
        for number, group in enumerate(section.groups):
            path: Path = ("optimizer", "groups", number)
            group_factor = _rate_factor(case, momenta.get((*path, "momentum"), momentum))
            lr_factor = group.lr_factor * group_factor / mean_factor
            why = "as optimizer.lr, with this group's own momentum"
            draft.set((*path, "lr_factor"), lr_factor, case.rule, why)


def _rescale_averages(draft: Draft, case: Case) -> None:
    """Rescale the decays of moving averages: momentum, betas, alpha, average.decay."""
    section, k = case.recipe.optimizer, case.k
    if case.rule == "half-life":
        for path, m in find_numbers(section, "momentum"):
            momentum = rules.half_life(1.0, m, k)[1]
            draft.set(path, momentum, case.rule, "m^k: it halves over the same examples", default=m)
    if case.kind is not None and case.rule == "sqrt":
        for name in case.kind.averages:
            for path, old in find_numbers(section, name):
                is_list = isinstance(old, list | tuple)
                betas = list(old) if is_list else [old]
                scaled = [rules.retention(beta, k) for beta in betas]
                why = f"beta^k: it halves over the same examples{_describe_first_order(betas, k)}"
                new: Any = scaled if is_list else scaled[0]
                draft.set(path, new, case.rule, why, default=betas if is_list else old)
    why = "rho^k: it halves over the same examples (Busbridge et al. 2023)"
    draft.map(("average", "decay"), lambda rho: rules.retention(rho, k), "average", why)


def _describe_first_order(betas: list[float], k: float) -> str:
    """Describe what Malladi et al. take in place of beta^k, if that is above 0."""
    if any(rules.forgets_all(beta, k) for beta in betas):
        return ""
    near = ", ".join(f"{rules.first_order(beta, k):.4g}" for beta in betas)
    return f"; 1 - k (1 - beta) = {near} to first order"


def _rescale_decay(draft: Draft, case: Case) -> None:
    """Rescale weight decay, coupled or not, and penalties."""
    section, kind = case.recipe.optimizer, case.kind
    as_sum = "times k, as the sum that it is added to"
    for path in draft.list_penalties():
        draft.map(path, lambda strength: strength * case.sum_factor(1), "sum", as_sum)
    if kind is None:
        return
    why = "lr decay stays in proportion to the batch (Wang and Aitchison 2024)"
    for path, old in find_numbers(section, "weight_decay"):
        if kind.is_decoupled:
            new = rules.adamw_decay(old, _rate_factor(case, 0.0), case.k)
            draft.set(path, new, "decay", why, default=old)
        else:
            draft.set(path, old * case.sum_factor(1), "sum", as_sum, default=old)


def _rescale_sizes(draft: Draft, case: Case) -> None:
    """Rescale what a gradient, or its square, is compared with: clip_norm, eps, accumulator."""
    section, kind, k = case.recipe.optimizer, case.kind, case.k
    noise = rules.noise_size(1.0, k) if case.rule in ("sqrt", "adagrad") else 1.0
    why = "/ sqrt(k), as the noise" if noise != 1.0 else "times k, as the sum"
    clip: Path = ("optimizer", "clip_norm")
    draft.map(clip, lambda c: c * noise * case.sum_factor(1), case.rule, why)
    if kind is None:
        return
    squares = {"sqrt": 1 / k, "adagrad": rules.sum_of_squares(1.0, k)}.get(case.rule, 1.0)
    root = math.sqrt(squares) if section.name == "adagrad" else noise
    for name, factor in (("eps", root), ("initial_accumulator_value", squares)):
        if name in kind.powers:
            sum_factor = case.sum_factor(kind.powers[name])
            why = f"as what it is added to: {factor * sum_factor:.4g} times"
            for path, old in find_numbers(section, name):
                draft.set(path, old * factor * sum_factor, case.rule, why, default=old)


def _rescale_counts(draft: Draft, case: Case) -> None:
    """Rescale what is counted in updates or in batches."""
    k, order = case.k, case.recipe.order
    if case.recipe.optimizer.name == "adagrad":
        for path, old in find_numbers(case.recipe.optimizer, "lr_decay"):
            draft.set(path, old * k, "updates", "an update is k of them", default=old)
    for path, name, _ in list_terms(case.recipe.objective.reduction):
        if name == "group_dro":
            why = "a step of q an update: k of them in one"
            draft.map((*path, "eta"), lambda eta: eta * k, "updates", why)
    if order.name == "by_length":
        default = inspect.signature(ORDERS["by_length"]).parameters["window"].default
        old = order.args.get("window", default)
        why = "batches: a window has as many examples, as nearly as whole batches have"
        new = _rescale_count(old, 1 / k, "order.args.window")
        draft.set(("order", "args", "window"), new, "updates", why, default=old)
    if order.name == "growing":
        sizes = [_rescale_pair(pair, k) for pair in order.args.get("sizes", ())]
        draft.set(("order", "args", "sizes"), sizes, "asked", "each size times k")


def _rescale_pair(pair: Any, k: float) -> list[int]:
    """Rescale a pair [examples, batch size]: the size times k."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise RecipeError(f"order.args.sizes: expected pairs [examples, size], got {pair!r}.")
    return [pair[0], _rescale_count(pair[1], k, "order.args.sizes")]


def _rescale_count(number: Any, factor: float, key: str) -> int:
    """Multiply a count by a factor, and return at least 1."""
    if not is_count(number):
        raise RecipeError(f"{key}: expected an integer of at least 1, got {number!r}.")
    scaled: float = number * factor
    return max(1, round(scaled))


def _set_grain(draft: Draft, case: Case) -> None:
    """Make the old batch size the grain, over which batch normalisation takes its statistics."""
    if case.recipe.objective.grain is not None:
        return
    if case.new > case.old:
        why = "statistics stay those of as many examples"
        draft.set(("objective", "grain"), case.old, "statistics", why)
    else:
        draft.warnings.append(
            f"batch normalisation takes its statistics from {case.new:,} examples in place of "
            f"{case.old:,}, which is another objective"
        )


def find_batch_norms(model: nn.Module) -> list[BATCH_NORMS]:
    """Find the layers of batch normalisation."""
    return [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS)]


def rescale_statistics(model: nn.Module, k: float) -> list[Change]:
    """Set the momentum of running statistics for batches of k times the size.

    Layers without running statistics, or that average them over all batches (momentum None), stay.
    """
    changes: dict[float, Change] = {}
    for layer in find_batch_norms(model):
        old = layer.momentum
        if old is not None and layer.running_mean is not None and k != 1:
            layer.momentum = rules.running_statistics(old, k)
            why = "1 - (1 - m)^k: running statistics keep as much over the same examples"
            key = "momentum of batch normalisation, in the model"
            changes[old] = Change(key, old, layer.momentum, "statistics", why)
    return list(changes.values())
