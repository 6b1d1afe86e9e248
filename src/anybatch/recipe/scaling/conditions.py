"""Warn where the condition of a rule fails, or where nobody can tell."""

from collections.abc import Iterator

from anybatch.recipe.code import is_code
from anybatch.recipe.scaling.case import ADASCALE, Case, find_numbers
from anybatch.recipe.scaling.rules import forgets_all

__all__ = ["list_warnings"]

MAX_LINEAR = 8192  # examples: Goyal et al. 2017, figure 1
MAX_LINEAR_K = 32  # from 256 to 8,192
DERIVED = {"linear": ("linear", "half-life"), "sqrt": ("sqrt",), "adagrad": ("adagrad",)}


def list_warnings(case: Case) -> Iterator[str]:
    """List what to check before the rescaled recipe is used."""
    yield from _warn_of_rate(case)
    yield from _warn_of_averages(case)
    yield from _warn_of_batch(case)


def _warn_of_rate(case: Case) -> Iterator[str]:
    recipe, kind, rule = case.recipe, case.kind, case.rule
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if rule in ("linear", "half-life"):
        if case.k > 1 and not schedule.warm_up:
            yield (
                f"warm-up needed: in the first epochs weights change too fast for k lr. Add it to "
                f"the original recipe: schedule.warm_up = EXAMPLES, some epochs of them (5 of 90 "
                f"in Goyal et al. 2017), and schedule.warm_up_start = {optimizer.lr:g}, the old "
                f"rate"
            )
        if case.new > MAX_LINEAR or case.k > MAX_LINEAR_K:
            yield (
                f"beyond the known range: on ImageNet the linear rule held from 256 up to 8,192 "
                f"examples, k = 32 (Goyal et al. 2017), on smaller data less far. Here are "
                f"{case.new:,} examples, k = {case.k:g}"
            )
        if optimizer.clip_norm is not None:
            yield (
                "clip_norm stays. That is right where the gradient outweighs its noise. Where "
                "noise does, norms fall by up to sqrt(k), and fewer updates are clipped"
            )
    if kind is not None and rule not in (*DERIVED[kind.rule], ADASCALE):
        if rule == "none":
            yield "none: rate, momentum, betas, epsilon and clip norm stay as they are"
        else:
            yield (
                f"{rule} is no rule for {optimizer.name}, whose own is {kind.rule}. Use it only "
                f"as a control"
            )
    changes = schedule.name != "constant" or schedule.warm_up or case.k > 1
    if optimizer.name == "caffe_sgd" and changes and rule != "none":
        yield (
            "caffe_sgd: its velocity contains the rate. Wherever the rate changes, it lags by "
            "1 / (1 - momentum) updates, now k times the examples. optimizer.name = 'sgd' makes "
            "the same path at a constant rate, and has the correction (Goyal et al. 2017, remark 2)"
        )


def _warn_of_averages(case: Case) -> Iterator[str]:
    optimizer, k = case.recipe.optimizer, case.k
    if case.kind is None:
        yield f"{optimizer.name}: its own arguments stay. Some of them may count updates"
    elif case.rule == "sqrt":
        for name in case.kind.averages:
            for path, value in find_numbers(optimizer, name):
                for beta in value if isinstance(value, list | tuple) else [value]:
                    if forgets_all(beta, k):
                        yield (
                            f"{'.'.join(map(str, path))} = {beta:g}: k (1 - beta) = "
                            f"{k * (1 - beta):.3g} is not below 1. An update then forgets about "
                            f"all updates before it; beta^k = {beta**k:.3g} is far from the first "
                            f"order that the rule was derived for"
                        )
        if optimizer.args.get("momentum"):
            yield "momentum of RMSProp stays: the rule was derived for RMSProp without it"
    if case.recipe.average.warm_up:
        yield "average.warm_up counts updates, (1 + n) / (10 + n), and cannot be rescaled"


def _warn_of_batch(case: Case) -> Iterator[str]:
    recipe = case.recipe
    grain = recipe.objective.grain
    if recipe.batch.last == "keep" and recipe.order.name != "growing":
        yield (
            f"a last batch of fewer than {case.new:,} examples has the rate of a full one, and its "
            f"examples weigh more. batch.last = 'carry' has no such batch; nor has 'keep' if "
            f"{case.new:,} divides the data"
        )
    if grain is not None and grain > case.new:
        yield (
            f"objective.grain = {grain} is more than a batch of {case.new:,}. Statistics of batch "
            f"normalisation are now those of fewer examples, which is another objective"
        )
    if is_code(recipe.order.name):
        yield f"order.name = {recipe.order.name!r} is code of yours: its arguments stay"
