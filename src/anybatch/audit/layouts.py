"""Check that a training step gives a batch one gradient, however the batch is cut.

    a layout differs if   |g - w| > tolerance * s,   s = max(|w|, sqrt(mean_i |g_i|^2))

w is the gradient of the whole batch in one micro-batch, g that of another layout, g_i that of
example i alone. The scale is not |w| alone: if the g_i nearly cancel, w is small, but the rounding
in g - w is not.

    g = f w + r,    f = <g, w> / |w|^2

f is the factor by which g differs, and r the rest. With K micro-batches, a forgotten division shows
as f = K, one too many as f = 1/K. A mean of means shows on unequal micro-batches only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch.batch import is_count, is_number
from anybatch.errors import AnybatchError
from anybatch.pytree import MicroBatches, count_examples, prepare_batch, take_examples

__all__ = [
    "Comparison",
    "assert_layout_invariant",
    "call_step",
    "choose_tolerance",
    "compare_gradients",
    "compute_gradient",
    "describe_sizes",
    "find_scale",
    "flatten_tensors",
    "guess_cause",
    "list_layouts",
]

# About 50 times the error of correct plain loops (4 to 256 examples, three layers) in the half
# precisions, and 100 times in float32. In float64 it is what the library promises for itself.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_DIVIDE = "Divide the summed loss of each micro-batch by the count of the whole batch"
_NOT_DIVIDED = f"""the loss is not divided by the number of micro-batches, or is divided by a \
constant. {_DIVIDE}"""
_DIVIDED_TWICE = """the loss is divided twice: by the count of the whole batch, and again by the \
number of micro-batches (or of ranks). Drop the second division"""
_MEAN_OF_MEANS = f"a mean of means: micro-batches of unequal size weigh the same. {_DIVIDE}"
_SHORT_END = """the divisor of the loss counts the last, shorter micro-batch as a full one. Count \
the examples of the whole batch"""
_NO_FACTOR = """no common factor fits. Micro-batches with unequal counts (tokens) weigh the same, \
examples are coupled (batch normalisation), gradients are lost between micro-batches, or the step \
computes in a lower precision than its weights (then pass a tolerance)"""


class Comparison(NamedTuple):
    """Difference of the gradient g of a layout from w."""

    sizes: Sequence[int]  # of its micro-batches
    difference: float  # |g - w| / s
    factor: float  # f; nan if w is 0 within the tolerance
    rest: float  # |r| / s


def assert_layout_invariant(
    training_step: Callable[[list[Any]], nn.Module | Iterable[Tensor]],
    batch: Any,
    *,
    micro_batches: Iterable[int] | None = None,
    tolerance: float | None = None,
) -> None:
    """Fail unless a training step leaves the same gradient for every layout of a batch.

    >>> import torch
    >>> import anybatch as ab
    >>> model = torch.nn.Linear(3, 1)
    >>> def step(micro_batches):  # divides by the examples of the whole batch: correct
    ...     model.zero_grad()
    ...     count = sum(len(inputs) for inputs, _ in micro_batches)
    ...     for inputs, targets in micro_batches:
    ...         ((model(inputs) - targets).square().sum() / count).backward()
    ...     return model
    >>> ab.assert_layout_invariant(step, (torch.randn(8, 3), torch.randn(8, 1)))

    Args:
        training_step: gets the batch as a list of micro-batches, each the same pytree as
            `batch`. It does one whole update except the optimiser's step: it zeroes the
            gradients, goes forward and backward, and returns the model or its parameters. It must
            not draw random numbers. It is called three times with the whole batch, once with each
            example alone, and once for each layout. Gradients are None afterwards.
        batch: pytree whose leaves have the B >= 2 examples first, or `MicroBatches`: each of its
            pieces is cut by itself, and the whole batch is all pieces.
        micro_batches: sizes of a micro-batch to try, each from 1 to B-1. The last micro-batch may
            be shorter: 3 of 8 examples is 3+3+2. By default 1 and about 1/4, 1/3, 1/2 and 3/4 of B.
        tolerance: largest |g - w| / s that passes. By default that of the coarsest dtype of the
            weights: 1e-12 float64, 1e-5 float32, 1e-2 float16, 5e-2 bfloat16.

    Raises:
        AssertionError: naming each layout that differs, its factor, and a likely cause.
        AnybatchError: a batch or a step that cannot be judged: no parameters or gradient, not
            finite, weights changed, gradients accumulated or random from call to call.
    """
    _check_arguments(training_step, tolerance)
    count = count_examples(batch)
    layouts = list_layouts(count, micro_batches)
    parameters = call_step(training_step, batch, [count])
    weights = flatten_tensors(parameters)
    if tolerance is None:
        tolerance = choose_tolerance(parameters)

    def compute(sizes: Sequence[int], start: int = 0) -> Tensor:
        for p in parameters:
            p.grad = None
        return compute_gradient(training_step, batch, weights, sizes, start)

    whole = compute([count])
    again = compute_gradient(training_step, batch, weights, [count])  # without clearing
    norms = [compute([1], start).norm().item() for start in range(count)]
    scale = find_scale(whole, norms)
    _check_repeatable(whole, again, tolerance * scale)
    comparisons = [
        compare_gradients(sizes, compute(sizes), whole, scale, tolerance) for sizes in layouts
    ]
    for p in parameters:
        p.grad = None
    _check_equal(comparisons, scale, tolerance)


def choose_tolerance(parameters: Iterable[Tensor]) -> float:
    """Return the tolerance of the coarsest dtype of the parameters."""
    return max(_TOLERANCE.get(p.dtype.to_real(), 5e-2) for p in parameters)


def compute_gradient(
    training_step: Callable[[list[Any]], object],
    batch: Any,
    weights: Tensor,
    sizes: Sequence[int],
    start: int = 0,
) -> Tensor:
    """Call the step, and return its gradient as one vector."""
    trained = call_step(training_step, batch, sizes, start)
    if not torch.equal(flatten_tensors(trained), weights):
        raise AnybatchError(
            "training_step changed the weights. They must be the same before and after. Stop "
            "before optimizer.step(), and use the same model at each call."
        )
    return flatten_tensors(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)


def _check_arguments(training_step: object, tolerance: Any) -> None:
    if not callable(training_step) or isinstance(training_step, nn.Module):
        raise AnybatchError(
            f"training_step is of type {type(training_step).__name__}. It must be a function of a "
            f"list of micro-batches that goes forward and backward, and returns the model."
        )
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise AnybatchError(f"tolerance is {tolerance!r}. It must be a number of at least 0.")


def list_layouts(count: int, micro_batches: Iterable[int] | None) -> list[list[int]]:
    """Return the sizes of the micro-batches of each layout, except the whole batch in one."""
    if count < 2:
        raise AnybatchError(f"A batch of {count} examples has one layout. Pass 2 or more examples.")
    if micro_batches is None:
        rounded_up = {-(-count * k // 12) for k in (3, 4, 6, 9)}
        micro_batches = {1, *rounded_up} - {count}
    sizes = list(micro_batches) if isinstance(micro_batches, Iterable) else [micro_batches]
    if not all(is_count(size) or size == 0 for size in sizes):
        raise AnybatchError(
            f"micro_batches is {micro_batches!r}. It must be a list of sizes, integers of at least "
            f"1, such as [1, 3]."
        )
    sizes = sorted(set(sizes))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] < count:
        raise AnybatchError(
            f"micro_batches is {sizes}. For a batch of {count} examples sizes must be from 1 to "
            f"{count - 1}, since each layout is compared with the whole batch."
        )
    return [[min(m, count - start) for start in range(0, count, m)] for m in sizes]


def call_step(
    training_step: Callable[[list[Any]], object], batch: Any, sizes: Sequence[int], start: int = 0
) -> list[Tensor]:
    """Call the step on consecutive micro-batches, and return the parameters that it trains."""
    bounds = pairwise(accumulate(sizes, initial=start))
    try:
        parts = [take_examples(batch, a, b) for a, b in bounds]
        cut = [part.batches if isinstance(part, MicroBatches) else [part] for part in parts]
        result = training_step([prepare_batch(part) for pieces in cut for part in pieces])
    except Exception as error:
        error.add_note(
            f"training_step raised this on micro-batches of at most {max(sizes)} examples. It must "
            f"work for one example alone too. With batch normalisation every layout differs."
        )
        raise
    parameters: Any = result.parameters() if isinstance(result, nn.Module) else result
    if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor):
        parameters = ()
    trained = [p for p in parameters if isinstance(p, Tensor) and p.requires_grad]
    if not trained:
        raise AnybatchError(
            f"training_step returned {type(result).__name__} without parameters that require a "
            f"gradient. It must return the model or its parameters: end it with 'return model'."
        )
    return trained


def flatten_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Copy tensors into one float64 vector on the CPU; a complex number becomes two."""
    dense = [t.detach().to_dense().cpu() for t in tensors]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    return torch.cat([t.double().flatten() for t in real])


def find_scale(whole: Tensor, norms: Sequence[float]) -> float:
    """Compute s = max(|w|, sqrt(mean_i |g_i|^2))."""
    # An example without a counted term (all tokens masked) correctly gives 0 / 0 on its own.
    finite = [norm for norm in norms if math.isfinite(norm)]
    scale = max(float(whole.norm()), math.hypot(*finite) / math.sqrt(max(len(finite), 1)))
    if not whole.isfinite().all():
        raise AnybatchError(
            "The gradient of the whole batch is not finite, so there is nothing to compare. Check "
            "the loss, and start with weights and examples that give finite gradients."
        )
    if scale == 0:
        raise AnybatchError(
            "training_step left no gradient: every p.grad is None or 0. Call loss.backward() in "
            "it, do not zero the gradients again, and return the same parameters."
        )
    return scale


def _check_repeatable(whole: Tensor, again: Tensor, limit: float) -> None:
    if not (again - whole).norm() <= limit:  # nan is not
        why = "It draws random numbers: put the model in eval mode, or set dropout to 0."
        if (again - 2 * whole).norm() <= limit:
            why = "It adds to the gradients of its previous call: begin with model.zero_grad()."
        raise AnybatchError(
            f"training_step gave two gradients for the same batch and weights. They must be equal. "
            f"{why}"
        )


def _check_equal(comparisons: Sequence[Comparison], scale: float, tolerance: float) -> None:
    """Fail if a layout differs."""
    differing = [c for c in comparisons if not c.difference <= tolerance]  # nan differs
    if differing:
        lines = "\n".join(_describe(comparison, tolerance) for comparison in differing)
        raise AssertionError(
            f"The gradient depends on the layout. It must equal that of the whole batch within "
            f"{tolerance:.3g} of the scale {scale:.3g}. Micro-batches that differ:\n{lines}\n"
            f"Likely cause: {guess_cause(differing, tolerance)}."
        )


def compare_gradients(
    sizes: Sequence[int], gradient: Tensor, whole: Tensor, scale: float, tolerance: float
) -> Comparison:
    """Split g into a multiple of w and the rest."""
    difference = (gradient - whole).norm().item() / scale
    if whole.norm().item() <= tolerance * scale:
        return Comparison(sizes, difference, math.nan, difference)
    factor = (gradient @ whole / (whole @ whole)).item()
    return Comparison(sizes, difference, factor, (gradient - factor * whole).norm().item() / scale)


def _describe(comparison: Comparison, tolerance: float) -> str:
    """Describe in a line how a layout differs."""
    sizes, difference, factor, rest = comparison
    if not math.isfinite(difference):
        text = "not finite (0 / 0 in a micro-batch without a counted term?)"
    elif math.isnan(factor):
        text = f"{difference:.3g} of the scale, while the whole batch's gradient is 0"
    else:
        more = f", and {rest:.3g} of the scale beyond a factor" * (rest > tolerance)
        text = f"{factor:.3f} times (off by {difference:.3g} of the scale{more})"
    return f"  {describe_sizes(sizes)}: {text}"


def describe_sizes(sizes: Sequence[int]) -> str:
    """Describe the micro-batches of a layout, such as 3+3+2."""
    short = sizes if len(sizes) <= 8 else [*sizes[:2], "...", sizes[-1]]
    return "+".join(map(str, short))


def guess_cause(differing: Sequence[Comparison], tolerance: float) -> str:
    """Return the mistake that fits all layouts that differ."""
    # Equal micro-batches tell a wrong divisor from wrong weights. Without any, use all layouts.
    equal = [comparison for comparison in differing if len(set(comparison.sizes)) == 1]
    factors = [(c.factor, len(c.sizes)) for c in equal or differing]
    if all(math.isclose(f, k, rel_tol=0.2) for f, k in factors):  # roughly: unequal ends add theirs
        return _NOT_DIVIDED
    if all(math.isclose(f, 1 / k, rel_tol=0.2) for f, k in factors):
        return _DIVIDED_TWICE
    if equal:
        return _NO_FACTOR
    return _SHORT_END if all(c.rest <= tolerance for c in differing) else _MEAN_OF_MEANS
