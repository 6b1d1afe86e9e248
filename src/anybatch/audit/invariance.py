"""Whether a training step gives a batch one gradient, however the batch is cut.

    a layout differs where   |g - w| > tolerance * s,   s = max(|w|, sqrt(mean_i |g_i|^2))
    and is told as           g = f w + r,               f = <g, w> / |w|^2

w is the gradient of the whole batch in one micro-batch, g that of another layout, g_i that of
example i as a batch of its own; f is the factor by which g differs, r what no factor explains.

Why the scale s is not |w|: the rounding error of a sum follows the size of its terms. Where the
g_i nearly cancel, w is small, g - w is rounding as ever, and their ratio says nothing. In a mean
s is the size of one example's gradient, which |w| cannot much exceed; in a sum |w| can, hence
the maximum.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.batch import ready, size, take
from anybatch.errors import AnybatchError

__all__ = ["assert_layout_invariant"]

# Some 50 times what a right plain loop showed (4 to 256 examples, three layers) in the half
# precisions, 100 times in float32; float64 as promised by the library for its own gradients.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_NOT_DIVIDED = (
    "the loss is not divided by the number of micro-batches, or by a constant that does not "
    "follow it. Divide each micro-batch's summed loss by the count of the whole batch"
)
_DIVIDED_TWICE = (
    "the loss is divided twice: by the count of the whole batch, and again by the number of "
    "micro-batches (or of ranks). Drop the second division"
)
_MEAN_OF_MEANS = (
    "a mean of means: micro-batches of unequal size weigh the same. "
    "Divide each micro-batch's summed loss by the count of the whole batch"
)
_SHORT_END = (
    "the count that divides the loss takes the last, shorter micro-batch for a full one. "
    "Count the examples of the whole batch"
)
_NO_FACTOR = (
    "no common factor explains it. Micro-batches with unequal counts (tokens) weigh the same, "
    "examples are coupled (batch normalisation), gradients are lost between micro-batches, or "
    "the step computes in less precision than its weights have (then pass a tolerance)"
)


def assert_layout_invariant(
    training_step: Callable[[list[Any]], nn.Module | Iterable[Tensor]],
    batch: Any,
    *,
    micro_batches: Iterable[int] | None = None,
    tolerance: float | None = None,
) -> None:
    """Fail unless a training step leaves the same gradient for every layout of a batch.

    Args:
        training_step: gets the batch as a list of micro-batches, each the same pytree as
            `batch`; does all of one update short of the optimiser's step (zeroes the gradients,
            goes forward and back) and returns the model, or its parameters. It must not draw
            random numbers. It is called B times with one example alone, for the scale, twice
            with the whole batch, and once for each layout.
        batch: pytree whose leaves have the B >= 2 examples first.
        micro_batches: examples a micro-batch, each from 1 to B-1; a last one may be shorter:
            3 of 8 examples is 3+3+2. By default 1 and about 1/4, 1/3, 1/2 and 3/4 of B.
        tolerance: largest |g - w| / s that passes, s the scale of the module's docstring. By
            default by the coarsest dtype of the weights: 1e-12 float64, 1e-5 float32,
            1e-2 float16, 5e-2 bfloat16.

    Returns:
        Nothing. Gradients are left cleared, weights as the step leaves them.

    Raises:
        AssertionError: naming each layout that differs, its factor, and a likely cause.
        AnybatchError: a batch or a step that cannot be judged: no parameters or gradient, not
            finite, weights changed, gradients accumulated or random from call to call.
    """
    count = size(batch)
    layouts = _layouts(count, micro_batches)
    first = _update(training_step, batch, [count])
    if not first.gradient.isfinite().all():
        raise AnybatchError(
            "the gradient of the whole batch is not finite, expected numbers to compare. "
            "Check the loss, and begin with weights and examples that give finite ones."
        )

    def gradient(sizes: Sequence[int], start: int = 0) -> Tensor:
        update = _update(training_step, batch, sizes, start)
        _check_same_weights(first, update)
        for parameter in update.parameters:
            parameter.grad = None
        return update.gradient

    again = gradient([count])  # the first call's gradients still lie there: shows accumulation
    scale = _scale(first.gradient, [gradient([1], i).norm().item() for i in range(count)])
    if tolerance is None:
        tolerance = max(_TOLERANCE.get(p.dtype, 5e-2) for p in first.parameters)
    _check_repeatable(first.gradient, again, lambda: gradient([count]), tolerance * scale)
    compared = [_compare(s, gradient(s), first.gradient, scale, tolerance) for s in layouts]
    if any(one.differs for one in compared):
        raise AssertionError(_report(compared, tolerance, scale))


def _layouts(count: int, micro_batches: Iterable[int] | None) -> list[list[int]]:
    """Sizes of the micro-batches of each layout, the undivided one left out."""
    if count < 2:
        raise AnybatchError(f"a batch of {count} examples has one layout; pass 2 or more.")
    if micro_batches is None:
        parts = {-(-count * k // n) for k, n in ((1, 4), (1, 3), (1, 2), (3, 4))}  # rounded up
        micro_batches = {1, *parts} - {count}
    chosen = sorted(set(micro_batches))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] < count:
        raise AnybatchError(
            f"micro_batches is {chosen}, expected sizes from 1 to {count - 1} for a batch of "
            f"{count} examples: the undivided batch is what they are compared with."
        )
    return [[min(m, count - start) for start in range(0, count, m)] for m in chosen]


@dataclass(frozen=True, slots=True)
class _Update:
    """What one call of the training step leaves behind."""

    parameters: list[Tensor]
    weights: Tensor  # all parameters, flat
    gradient: Tensor  # all gradients, flat, zeros for None; float64, so that norms are exact


def _update(
    training_step: Callable[[list[Any]], object], batch: Any, sizes: Sequence[int], start: int = 0
) -> _Update:
    bounds = pairwise(accumulate(sizes, initial=start))
    try:
        returned = training_step([ready(take(batch, a, b)) for a, b in bounds])
    except Exception as error:
        error.add_note(
            f"training_step raised this on micro-batches of {_written(sizes)} examples. It must "
            f"work for one example alone too; with batch normalisation no layout gives the same."
        )
        raise
    parameters = _parameters(returned)
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    return _Update(parameters, _flat(parameters), _flat(gradients))


def _parameters(returned: object) -> list[Tensor]:
    if isinstance(returned, nn.Module):
        found: list[Any] = list(returned.parameters())
    elif isinstance(returned, Iterable) and not isinstance(returned, Tensor):
        found = list(returned)
    else:
        found = []
    trained = [p for p in found if isinstance(p, Tensor) and p.requires_grad]
    if not trained:
        raise AnybatchError(
            f"training_step returned {type(returned).__name__} without parameters that require a "
            f"gradient, expected the model or its parameters. End it with 'return model'."
        )
    return trained


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector on the CPU, a copy."""
    return torch.cat([t.detach().to_dense().cpu().double().flatten() for t in tensors])


def _check_same_weights(before: _Update, after: _Update) -> None:
    if not torch.equal(before.weights, after.weights):
        raise AnybatchError(
            "training_step changed the weights, expected the same before and after. "
            "The step must stop before optimizer.step(), and use the same model at each call."
        )


def _scale(whole: Tensor, alone: Sequence[float]) -> float:
    """s = max(|w|, sqrt(mean_i |g_i|^2))."""
    # An example without a counted term (all tokens masked) gives 0 / 0 on its own, rightly.
    known = [norm for norm in alone if math.isfinite(norm)]
    scale = max(float(whole.norm()), math.hypot(*known) / math.sqrt(max(len(known), 1)))
    if scale == 0:
        raise AnybatchError(
            "training_step left no gradient: every p.grad is None or 0. Expected those of "
            "loss.backward(), not zeroed again, in the parameters that the step returns."
        )
    return scale


def _check_repeatable(
    first: Tensor, again: Tensor, anew: Callable[[], Tensor], limit: float
) -> None:
    if (again - first).norm() <= limit:
        return
    if (again - first - anew()).norm() <= limit:
        raise AnybatchError(
            "training_step adds to the gradients of its previous call, expected a fresh start. "
            "Zero them at its beginning: model.zero_grad()."
        )
    raise AnybatchError(
        "training_step gave two gradients for the same batch and weights, expected one. "
        "It draws random numbers: put the model in eval mode, or set dropout to 0."
    )


@dataclass(frozen=True, slots=True)
class _Comparison:
    sizes: Sequence[int]
    difference: float  # |g - w| / s
    factor: float  # f; nan where w is 0 within the tolerance
    unexplained: float  # |r| / s
    differs: bool
    is_multiple: bool  # r is 0 within the tolerance

    @property
    def equal_sizes(self) -> bool:
        return len(set(self.sizes)) == 1

    def is_about(self, factor: float) -> bool:
        return math.isclose(self.factor, factor, rel_tol=0.2)  # a mean of means may come on top


def _compare(
    sizes: Sequence[int], gradient: Tensor, whole: Tensor, scale: float, tolerance: float
) -> _Comparison:
    difference = (gradient - whole).norm().item() / scale
    factor, unexplained = math.nan, difference
    if whole.norm().item() > tolerance * scale:
        factor = (gradient @ whole / (whole @ whole)).item()
        unexplained = (gradient - factor * whole).norm().item() / scale
    return _Comparison(
        sizes=sizes,
        difference=difference,
        factor=factor,
        unexplained=unexplained,
        differs=not difference <= tolerance,  # nan differs
        is_multiple=unexplained <= tolerance,
    )


def _report(compared: Sequence[_Comparison], tolerance: float, scale: float) -> str:
    lines = "\n".join(f"  {_written(c.sizes)}: {_told(c)}" for c in compared if c.differs)
    return (
        f"the gradient depends on the layout, expected that of the whole batch within "
        f"{tolerance:.3g} of the scale {scale:.3g}. Micro-batches that differ:\n{lines}\n"
        f"Likely cause: {_likely_cause(compared)}."
    )


def _written(sizes: Sequence[int]) -> str:
    shown = sizes if len(sizes) <= 8 else [*sizes[:2], "...", sizes[-1]]
    return "+".join(map(str, shown))


def _told(one: _Comparison) -> str:
    if not math.isfinite(one.difference):
        return "not finite (0 / 0 in a micro-batch without a counted term?)"
    if math.isnan(one.factor):
        return f"{one.difference:.3g} of the scale, where the whole batch's gradient is 0"
    beyond = "" if one.is_multiple else f", and {one.unexplained:.3g} of the scale beyond a factor"
    return f"{one.factor:.3f} times (off by {one.difference:.3g} of the scale{beyond})"


def _likely_cause(compared: Sequence[_Comparison]) -> str:
    # Equal micro-batches tell a wrong divisor from wrong weights; without any, judge by all.
    judges = [c for c in compared if c.equal_sizes] or compared
    if all(c.is_about(len(c.sizes)) for c in judges):
        return _NOT_DIVIDED
    if all(c.is_about(1 / len(c.sizes)) for c in judges):
        return _DIVIDED_TWICE
    differing = [c for c in compared if c.differs]
    if any(c.equal_sizes for c in differing):
        return _NO_FACTOR
    return _SHORT_END if all(c.is_multiple for c in differing) else _MEAN_OF_MEANS
