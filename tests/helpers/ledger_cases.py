"""Figures of a batch by the ledger, and of each example alone by plain autograd.

`one_at_a_time` is the oracle: a forward and backward pass of torch for every example by itself. It
uses nothing of the library.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import anybatch as ab
from anybatch.ledger.ledger import Observe

ALL = Observe(parameter_norms=True, alignment=True, share=True, gradients=True)
LEAN = Observe(parameter_norms=True, alignment=True)
"""Without gradients of examples: sums, norms and inner products have formulas of their own."""
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative: products in another order differ by units of rounding, some hundred of them a sum; the
bound leaves a factor of 1e4 in float64 and of 10 in float32; a wrong formula is off by 1e-2."""

LSTM_IN_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="torch has no LSTM in bfloat16 on this processor",
)

Values = Callable[[nn.Module, Any], Tensor]


class Figures(NamedTuple):
    """Figures of B examples, by parameter, with coefficients c_i."""

    squares: dict[str, Tensor]  # |g_i|^2, [B]
    gradients: dict[str, Tensor]  # g_i, [B, ...]; empty if not observed
    total: dict[str, Tensor]  # sum_i c_i g_i
    inner: Tensor  # <g_i, sum_j c_j g_j> over all parameters, [B]


def values(model: nn.Module, batch: Any) -> Tensor:
    """Some curved number of each example's output, no two of whose elements count alike."""
    outputs = [x for x in tree_leaves(model(*batch)) if x.is_floating_point()]
    flat = torch.cat([x.flatten(1) for x in outputs], 1)
    weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return ((flat.square() + flat) * weights).sum(1)


def weights_of(batch: Any) -> Tensor:
    """Some c [B]."""
    size = len(tree_leaves(batch)[0])
    generator = torch.Generator().manual_seed(size)
    return torch.rand(size, generator=generator, dtype=torch.float64) + 0.1


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    bare = getattr(model, "_orig_mod", model)  # of a compiled model
    return {name: p for name, p in bare.named_parameters() if p.requires_grad}


def observe_figures(
    model: nn.Module, batch: Any, tell: Values = values, observe: Observe = ALL, **others: Any
) -> Figures:
    """Compute the figures by the library, the batch at once."""
    c = weights_of(batch)

    def reduction(losses: ab.ExampleLosses) -> Tensor:
        return (losses.values * c.to(losses.values.dtype)).sum()

    objective = ab.Objective(tell, reduction=reduction)
    gradient = ab.batch_gradient(model, objective, batch, observe=observe, **others)
    ledger = gradient.ledger
    assert ledger is not None
    assert ledger.parameter_norms is not None
    assert ledger.alignment is not None
    total = {n: real(p.grad.clone()) for n, p in trainable(model).items() if p.grad is not None}
    squares = {name: norms.square() for name, norms in ledger.parameter_norms.items()}
    gradients = {name: real(g) for name, g in (ledger.gradients or {}).items()}
    assert bool(gradients) == observe.gradients
    return Figures(squares, gradients, total, ledger.alignment)


def real(gradient: Tensor) -> Tensor:
    """A complex number as two real ones, of which it is the gradient."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def one_at_a_time(model: nn.Module, batch: Any, tell: Values = values) -> Figures:
    """Compute the figures by plain autograd, one example after the other."""
    c, parameters = weights_of(batch), trainable(model)
    rows = []
    for i in range(len(c)):
        model.zero_grad()
        tell(model, tree_map(lambda leaf, i=i: leaf[i : i + 1], batch)).sum().backward()
        rows.append(
            {
                n: real(torch.zeros_like(p) if p.grad is None else p.grad)
                for n, p in parameters.items()
            }
        )
    model.zero_grad()
    gradients = {name: torch.stack([row[name] for row in rows]) for name in parameters}
    total = {name: torch.tensordot(c.to(g.dtype), g, 1) for name, g in gradients.items()}
    squares = {name: g.reshape(len(g), -1).square().sum(1) for name, g in gradients.items()}
    inner = [(g.reshape(len(g), -1) @ total[name].flatten()) for name, g in gradients.items()]
    return Figures(squares, gradients, total, torch.stack(inner).sum(0))


def worst(figures: Figures, truth: Figures) -> float:
    """Return the largest relative distance of any figure.

    A parameter's gradient can be 0 up to rounding, so the reference is at least a thousandth of the
    norm of all parameters.
    """
    distances = [_distance(figures.inner, truth.inner, truth.inner.norm())]
    for values, true in zip(figures[:3], truth[:3], strict=True):
        if values is figures.gradients and not values:
            continue
        assert values.keys() == true.keys()
        whole = torch.stack([x.norm() for x in true.values()]).norm()
        distances += [_distance(values[n], true[n], 1e-3 * whole) for n in true]
    return max(distances)


def _distance(figures: Tensor, true: Tensor, least: Tensor) -> float:
    assert figures.shape == true.shape
    difference = (figures.double() - true.double()).norm()
    return float(difference / torch.maximum(true.norm(), least).clamp(min=1e-30))


def assert_as_one_at_a_time(
    model: nn.Module, batch: Any, tell: Values = values, **others: Any
) -> None:
    """Check that the ledger's figures are those of each example alone."""
    dtype = next(model.parameters()).dtype.to_real()
    truth = one_at_a_time(model, batch, tell)
    for observe in (ALL, LEAN):
        figures = observe_figures(model, batch, tell, observe, **others)
        assert worst(figures, truth) < BOUND[dtype]
