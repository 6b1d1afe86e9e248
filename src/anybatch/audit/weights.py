"""Measure the weight that a training step gives each example.

    w  =  argmin |g - sum_i w_i g_i|,      rest = |g - sum_i w_i g_i| / |g|

g is the gradient that the step leaves for a batch, cut in some way, and g_i the one that it leaves
for example i alone. A mean over B examples gives each w_i = 1/B, a sum 1, a mean over tokens
w_i = n_i / sum n. A rest says that examples are coupled, or that a term such as a penalty is added
once a micro-batch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.audit.layouts import (
    Comparison,
    call_step,
    choose_tolerance,
    compare_gradients,
    compute_gradient,
    describe_sizes,
    find_scale,
    flatten_tensors,
    guess_cause,
    list_layouts,
)
from anybatch.displays import make_table
from anybatch.errors import AnybatchError
from anybatch.pytree import count_examples

__all__ = ["Finding", "Report", "Weights", "check", "weigh"]

Step = Callable[[list[Any]], nn.Module | Iterable[Tensor]]

_MAX_CONDITION = 1e5  # of the examples' gradients: above it their weights cannot be told apart


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that a training step gives the examples of a batch."""

    values: Tensor
    """[B], float64: w_i, the factor of example i's own gradient."""
    rest: float
    """Norm of what no weights explain, over the norm of the gradient."""


def weigh(
    training_step: Step, batch: Any, *, micro_batches: Sequence[int] | None = None
) -> Weights:
    """Measure the weight that a training step gives each example of a batch.

    >>> model = nn.Linear(3, 1)
    >>> def step(micro_batches):  # a mean of means: the short end weighs as much as the others
    ...     model.zero_grad()
    ...     for inputs, targets in micro_batches:
    ...         loss = (model(inputs) - targets).square().mean()
    ...         (loss / len(micro_batches)).backward()
    ...     return model
    >>> _ = torch.manual_seed(0)
    >>> batch = torch.randn(3, 3), torch.randn(3, 1)
    >>> [round(w, 3) for w in weigh(step, batch, micro_batches=[2, 1]).values.tolist()]
    [0.25, 0.25, 0.5]

    Args:
        training_step: as for `assert_layout_invariant`; called once with the batch, and once with
            each example alone.
        batch: pytree whose leaves have the B >= 2 examples first.
        micro_batches: sizes of consecutive micro-batches; None: all at once.

    Raises:
        AnybatchError: the step cannot be judged, or the examples' gradients are so alike that no
            weights can be told apart: take fewer examples, or a larger model.
    """
    count = count_examples(batch)
    sizes = [count] if micro_batches is None else list(micro_batches)
    if count < 2 or sum(sizes) != count:
        raise AnybatchError(
            f"micro_batches is {sizes} for a batch of {count} examples. The sizes must add up to "
            f"the batch, which must hold at least 2."
        )
    compute = _Gradients(training_step, batch, call_step(training_step, batch, sizes))
    return _solve(compute(sizes), torch.stack([compute([1], i) for i in range(count)]))


class _Gradients:
    """Computes the gradients of a step for one batch, each from none.

    Args:
        parameters: those that the step trains.
    """

    def __init__(self, training_step: Step, batch: Any, parameters: Sequence[Tensor]) -> None:
        self._step, self._batch, self._parameters = training_step, batch, parameters
        self._weights = flatten_tensors(parameters)

    def __call__(self, sizes: Sequence[int], start: int = 0) -> Tensor:
        self.clear()
        return self.repeat(sizes, start)

    def repeat(self, sizes: Sequence[int], start: int = 0) -> Tensor:
        """Call the step with the gradients of its previous call in place."""
        return compute_gradient(self._step, self._batch, self._weights, sizes, start)

    def clear(self) -> None:
        """Set the gradients to None."""
        for p in self._parameters:
            p.grad = None


def _solve(gradient: Tensor, alone: Tensor) -> Weights:
    """Solve for the weights by least squares."""
    counted = alone.isfinite().all(1) & (alone.norm(dim=1) > 0)  # others cannot add anything
    rows = alone[counted]
    spectrum = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))
    if len(rows) > rows.shape[1] or spectrum[0] > _MAX_CONDITION * spectrum[-1]:
        raise AnybatchError(
            f"The gradients of these {len(rows)} examples are so alike that their weights cannot "
            f"be told apart. Take fewer examples, other ones, or a model with more parameters."
        )
    values = torch.zeros(len(alone), dtype=torch.float64)
    values[counted] = torch.linalg.lstsq(rows.T, gradient[:, None]).solution[:, 0]
    rest = (gradient - values[counted] @ rows).norm() / gradient.norm().clamp(min=1e-300)
    return Weights(values, float(rest))


@dataclass(frozen=True, slots=True)
class Finding:
    """Result for one layout of the batch."""

    sizes: Sequence[int]
    """Sizes of the micro-batches."""
    difference: float
    """|g - w| / s, see `assert_layout_invariant`."""
    factor: float
    """Factor of the whole batch's gradient; nan: there is none."""
    weights: Weights | None
    """None: the examples' gradients are too alike, or not finite."""


@dataclass(frozen=True, slots=True)
class Report:
    """Result of `check`; `print` it."""

    layouts: Sequence[Finding]
    tolerance: float
    defects: Sequence[str]
    """Each defect in a sentence; none: the step is the same for every layout."""

    @property
    def is_invariant(self) -> bool:
        """True if no defect was found."""
        return not self.defects

    def __str__(self) -> str:
        lines = [_describe(layout) for layout in self.layouts]
        return "\n".join([*lines, *self._list_verdicts()])

    def _list_verdicts(self) -> Sequence[str]:
        return self.defects or ["The gradient is the same for every layout that was tried."]

    def _repr_html_(self) -> str:
        """Make a table for a notebook."""
        rows = [_describe(layout).split(": ", 1) for layout in self.layouts]
        return make_table(" ".join(self._list_verdicts()), ["micro-batches", "gradient"], rows)


def check(
    training_step: Step,
    batch: Any,
    *,
    micro_batches: Iterable[int] | None = None,
    tolerance: float | None = None,
) -> Report:
    """Try a training step on many layouts, and name each defect in a report.

    >>> model = nn.Linear(3, 1)
    >>> def step(micro_batches):  # nobody divides by the number of micro-batches
    ...     model.zero_grad()
    ...     for inputs, targets in micro_batches:
    ...         (model(inputs) - targets).square().mean().backward()
    ...     return model
    >>> _ = torch.manual_seed(0)
    >>> print(check(step, (torch.randn(4, 3), torch.randn(4, 1)), micro_batches=[2]))
    2+2: 2.000 times the gradient of the whole batch
    Likely cause: the loss is not divided by the number of micro-batches, or is ...

    Args:
        training_step, batch, micro_batches, tolerance: as for `assert_layout_invariant`.

    Returns:
        For each layout its difference, factor and weights, and the defects in words. Nothing is
        raised for a defect.

    Raises:
        AnybatchError: the batch or the arguments are wrong, or the step left no gradient.
    """
    count = count_examples(batch)
    layouts = list_layouts(count, micro_batches)
    parameters = call_step(training_step, batch, [count])
    compute = _Gradients(training_step, batch, parameters)
    limit = choose_tolerance(parameters) if tolerance is None else tolerance
    whole, again = compute([count]), compute.repeat([count])
    alone = torch.stack([compute([1], i) for i in range(count)])
    scale = find_scale(whole, alone.norm(dim=1).tolist())
    if (again - whole).norm() > limit * scale:
        return Report([], limit, [_explain_repetition(whole, again, limit * scale)])
    findings, differing = [], []
    for sizes in layouts:
        gradient = compute(sizes)
        comparison = compare_gradients(sizes, gradient, whole, scale, limit)
        findings.append(_judge(comparison, gradient, alone))
        if not comparison.difference <= limit:  # nan differs
            differing.append(comparison)
    compute.clear()
    defects = [f"Likely cause: {guess_cause(differing, limit)}."] if differing else []
    return Report(findings, limit, defects)


def _judge(comparison: Comparison, gradient: Tensor, alone: Tensor) -> Finding:
    try:
        weights = _solve(gradient, alone) if gradient.isfinite().all() else None
    except AnybatchError:
        weights = None
    return Finding(comparison.sizes, comparison.difference, comparison.factor, weights)


def _explain_repetition(whole: Tensor, again: Tensor, limit: float) -> str:
    if (again - 2 * whole).norm() <= limit:
        return "The step adds to the gradients of its previous call: begin with model.zero_grad()."
    return (
        "The step gives two gradients for the same batch: it draws random numbers. Put the model "
        "in eval mode, or set dropout to 0, and check again."
    )


def _describe(layout: Finding) -> str:
    """Describe a layout in a line."""
    name = describe_sizes(layout.sizes)
    if not math.isfinite(layout.difference):
        return f"{name}: not finite"
    text = f"{layout.factor:.3f} times the gradient of the whole batch"
    weights = layout.weights
    if weights is not None:
        low, high = float(weights.values.min()), float(weights.values.max())
        if high - low > 1e-3 * abs(high):
            text += f"; an example weighs {low:.3g} to {high:.3g}"
        if weights.rest > 1e-3:
            text += f"; {weights.rest:.1%} of it is no weighted sum of the examples' gradients"
    return f"{name}: {text}"
