"""Whether a training step gives a batch one gradient, however the batch is cut.

    a layout differs where   |g - w| > tolerance * s,   s = max(|w|, sqrt(mean_i |g_i|^2))

w is the gradient of the whole batch in one micro-batch, g that of another layout, g_i that of
example i alone. The scale is not |w| alone: where the g_i nearly cancel, w is small, but g - w
is rounding of their size as ever.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.audit.diagnosis import compare, in_words, likely_cause
from anybatch.batch import is_count, is_number
from anybatch.errors import AnybatchError
from anybatch.pytree import count_examples, prepare_batch, take_examples

__all__ = ["assert_layout_invariant"]

# Some 50 times what a right plain loop showed (4 to 256 examples, three layers) in the half
# precisions, 100 times in float32; float64 as promised by the library for its own gradients.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
            random numbers. It is called three times with the whole batch, once with each example
            alone, and once for each layout; gradients are left cleared.
        batch: pytree whose leaves have the B >= 2 examples first.
        micro_batches: examples a micro-batch, each from 1 to B-1; a last one may be shorter:
            3 of 8 examples is 3+3+2. By default 1 and about 1/4, 1/3, 1/2 and 3/4 of B.
        tolerance: largest |g - w| / s that passes. By default by the coarsest dtype of the
            weights: 1e-12 float64, 1e-5 float32, 1e-2 float16, 5e-2 bfloat16.

    Raises:
        AssertionError: naming each layout that differs, its factor, and a likely cause.
        AnybatchError: a batch or a step that cannot be judged: no parameters or gradient, not
            finite, weights changed, gradients accumulated or random from call to call.
    """
    _check_arguments(training_step, tolerance)
    count = count_examples(batch)
    layouts = _layouts(count, micro_batches)
    parameters = _run(training_step, batch, [count])
    weights = _flat(parameters)
    if tolerance is None:
        tolerance = max(_TOLERANCE.get(p.dtype.to_real(), 5e-2) for p in parameters)

    def gradient(sizes: Sequence[int], start: int = 0, fresh: bool = True) -> Tensor:
        for p in parameters if fresh else ():
            p.grad = None
        trained = _run(training_step, batch, sizes, start)
        if not torch.equal(_flat(trained), weights):
            raise AnybatchError(
                "training_step changed the weights, expected the same before and after. The step "
                "must stop before optimizer.step(), and use the same model at each call."
            )
        return _flat(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)

    whole, again = gradient([count]), gradient([count], fresh=False)
    scale = _scale(whole, [gradient([1], start).norm().item() for start in range(count)])
    _check_repeatable(whole, again, tolerance * scale)
    compared = [compare(sizes, gradient(sizes), whole, scale, tolerance) for sizes in layouts]
    differing = [one for one in compared if not one.difference <= tolerance]  # nan differs
    for p in parameters:
        p.grad = None
    if differing:
        told = "\n".join(in_words(one, tolerance) for one in differing)
        raise AssertionError(
            f"the gradient depends on the layout, expected that of the whole batch within "
            f"{tolerance:.3g} of the scale {scale:.3g}. Micro-batches that differ:\n{told}\n"
            f"Likely cause: {likely_cause(differing, tolerance)}."
        )


def _check_arguments(training_step: object, tolerance: Any) -> None:
    if not callable(training_step) or isinstance(training_step, nn.Module):
        raise AnybatchError(
            f"training_step is of type {type(training_step).__name__}. It must be a function of a "
            f"list of micro-batches that goes forward and back, and returns the model."
        )
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise AnybatchError(f"tolerance is {tolerance!r}. It must be a number of at least 0.")


def _layouts(count: int, micro_batches: Iterable[int] | None) -> list[list[int]]:
    """Sizes of the micro-batches of each layout, the undivided one left out."""
    if count < 2:
        raise AnybatchError(f"a batch of {count} examples has one layout; pass 2 or more.")
    if micro_batches is None:
        rounded_up = {-(-count * k // 12) for k in (3, 4, 6, 9)}
        micro_batches = {1, *rounded_up} - {count}
    chosen = list(micro_batches) if isinstance(micro_batches, Iterable) else [micro_batches]
    if not all(is_count(size) or size == 0 for size in chosen):
        raise AnybatchError(
            f"micro_batches is {micro_batches!r}. It must be a list of sizes, integers of at least "
            f"1, such as [1, 3]."
        )
    chosen = sorted(set(chosen))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] < count:
        raise AnybatchError(
            f"micro_batches is {chosen}, expected sizes from 1 to {count - 1} for a batch of "
            f"{count} examples: the undivided batch is what they are compared with."
        )
    return [[min(m, count - start) for start in range(0, count, m)] for m in chosen]


def _run(
    training_step: Callable[[list[Any]], object], batch: Any, sizes: Sequence[int], start: int = 0
) -> list[Tensor]:
    """Call the step on consecutive micro-batches; the parameters that it trains."""
    bounds = pairwise(accumulate(sizes, initial=start))
    try:
        returned = training_step([prepare_batch(take_examples(batch, a, b)) for a, b in bounds])
    except Exception as error:
        error.add_note(
            f"training_step raised this on micro-batches of at most {max(sizes)} examples. It must "
            f"work for one example alone too; with batch normalisation no layout gives the same."
        )
        raise
    found: Any = returned.parameters() if isinstance(returned, nn.Module) else returned
    several = isinstance(found, Iterable) and not isinstance(found, Tensor)
    trained = [p for p in found if isinstance(p, Tensor) and p.requires_grad] if several else []
    if not trained:
        raise AnybatchError(
            f"training_step returned {type(returned).__name__} without parameters that require a "
            f"gradient, expected the model or its parameters. End it with 'return model'."
        )
    return trained


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector on the CPU, a copy; complex numbers are two each."""
    dense = [t.detach().to_dense().cpu() for t in tensors]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    return torch.cat([t.double().flatten() for t in real])


def _scale(whole: Tensor, alone: Sequence[float]) -> float:
    """s = max(|w|, sqrt(mean_i |g_i|^2))."""
    # An example without a counted term (all tokens masked) gives 0 / 0 on its own, rightly.
    known = [norm for norm in alone if math.isfinite(norm)]
    scale = max(float(whole.norm()), math.hypot(*known) / math.sqrt(max(len(known), 1)))
    if not whole.isfinite().all():
        raise AnybatchError(
            "the gradient of the whole batch is not finite, expected numbers to compare. "
            "Check the loss, and begin with weights and examples that give finite ones."
        )
    if scale == 0:
        raise AnybatchError(
            "training_step left no gradient: every p.grad is None or 0. Expected those of "
            "loss.backward(), not zeroed again, in the parameters that the step returns."
        )
    return scale


def _check_repeatable(whole: Tensor, again: Tensor, limit: float) -> None:
    if not (again - whole).norm() <= limit:  # nan is not
        why = "It draws random numbers: put the model in eval mode, or set dropout to 0."
        if (again - 2 * whole).norm() <= limit:
            why = "It adds to the gradients of its previous call: begin with model.zero_grad()."
        raise AnybatchError(
            f"training_step gave two gradients for the same batch and weights, expected one. {why}"
        )
