"""Gradients of the examples by plain autograd, one backward pass for each.

    g_i = gradient of c_i v_i alone,    i = 1 .. B,    through one graph

This needs B backward passes and knows nothing of the operations in the graph. So it is exact for
scripted code, functions written in C++, second derivatives and anything else that the ledger cannot
take apart by example (`OneByOne`). `.grad` comes from one more pass with all c_i, as it would
without the ledger. On a few examples it is also the reference that `calibration` compares with the
ledger:

    |g_i|^2  and  sum_i c_i g_i,    by parameter
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anybatch.ledger.contractions.base import PerExample, square_norms
from anybatch.ledger.gradient_stats import GradientStats, Projector, add_up
from anybatch.ledger.trial_run import ForwardProbe, preserve_grads, repeat_backward
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["CAUSES", "OneByOne", "Reference", "make_reference", "pop_grads"]

CAUSES = (
    "Are rows of different examples mixed there (packed, routed, sorted), or does the model couple "
    "examples? Keep examples along a dimension of their own, freeze the parameter, or leave the "
    "model unobserved."
)
_UNCONFIRMED = (
    f"Either examples cannot be told apart there, or the parameter is used in two layouts. {CAUSES}"
)
_SHRINK = 64
"""Divisor of the weights of the examples that go back together. A hook that clamps gradients then
clamps others than with weights of 1."""


class OneByOne:
    """A forward pass without interception, and B backward passes through it.

    Args:
        parameters: the trainable ones, by name.
        num_examples: B.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_examples: int) -> None:
        self._parameters, self._size = parameters, num_examples
        self.mode: AbstractContextManager[object] = nullcontext()
        """Context of the forward pass."""

    def backward(
        self,
        values: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        weights: Tensor | None = None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keep_uses: bool = False,
        keep_gradients: bool = False,
        projector: Projector | None = None,
    ) -> GradientStats:
        """Go backward from the values, and add sum_i c_i g_i to `.grad`.

        Args:
            values: [B, ...] each, with a graph.
            gradients: weights of the values in the backward pass, shaped like them.
            weights: c [B], the weights of the sum in `.grad`; None: 1 each.
            weigh: computes c from sum |g_i|^2 [B], if c depends on them.
            keep_uses: whether to keep the g_i, for inner products.
            keep_gradients: whether to return the g_i.
            projector: projects the g_i, if requested.
        """
        stats = GradientStats()
        keep = keep_uses or keep_gradients or projector is not None
        projections: Tensor | None = None
        rows = [self._go_back_one(values, gradients, i, keep) for i in range(self._size)]
        for name in self._parameters:
            stats.squares[name] = torch.stack([squares[name] for squares, _ in rows])
            if keep:
                g = torch.stack([each[name] for _, each in rows])
                if keep_gradients:
                    stats.gradients[name] = g
                if keep_uses:
                    stats.uses[name] = [PerExample(g)]
                if projector is not None:
                    projected, _ = projector.project(name, [PerExample(g)])
                    projections = add_up(projections, projected)
        if weigh is not None:
            weights = weigh(torch.stack(list(stats.squares.values())).sum(0))
        starts = [g if weights is None else _scale_rows(g, weights) for g in gradients]
        torch.autograd.backward(list(values), starts)
        return replace(stats, projections=projections)

    def _go_back_one(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor], example: int, keep: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute |g_i|^2 and, to keep, g_i of one example, by parameter."""
        mask = torch.zeros(self._size, device=values[0].device)
        mask[example] = 1
        results = self._differentiate(values, [_scale_rows(g, mask) for g in gradients])
        each = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(self._parameters.items(), results, strict=True)
        }
        squares = {name: square_norms(g.reshape(1, -1))[0] for name, g in each.items()}
        return squares, each if keep else {}

    def _differentiate(
        self, values: Sequence[Tensor], starts: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of all parameters, and leave `.grad` as it is."""
        parameters = list(self._parameters.values())
        try:
            return torch.autograd.grad(
                list(values), parameters, starts, retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
        # Reentrant activation checkpointing works only through `.grad`.
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        torch.autograd.backward(list(values), starts, retain_graph=True)
        gradients = [p.grad for p in parameters]
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad
        return gradients


def _scale_rows(rows: Tensor, factors: Tensor) -> Tensor:
    return rows * factors.to(rows).view(-1, *[1] * (rows.ndim - 1))


class Reference(NamedTuple):
    """Gradients of a few examples by plain autograd."""

    graph: Tensor  # v [B], with its graph
    squares: list[dict[str, float]]  # |g_i|^2 by example and parameter
    weights: Tensor  # c [B]
    total: dict[str, Tensor]  # sum_i c_i g_i by parameter, each example alone
    together: dict[str, Tensor]  # the same in one pass

    @property
    def values(self) -> Tensor:
        """v [B], without its graph."""
        return self.graph.detach()

    def is_linear(self, eps: float) -> bool:
        """Return whether gradients are proportional to the weights of the examples."""
        norms = {
            name: sum(
                weight * squares.get(name, 0.0) ** 0.5
                for weight, squares in zip(self.weights.tolist(), self.squares, strict=True)
            )
            for name in self.total
        }
        try:
            _compare_totals(self.together, self.total, norms, eps)
        except UnplacedError:
            return False
        return True

    def compare(
        self, total: Mapping[str, Tensor], squares: Mapping[str, Tensor], eps: float
    ) -> None:
        """Compare the ledger's sum_i c_i g_i and |g_i|^2 [B], by parameter, with these."""
        for i, expected in enumerate(self.squares):
            each = {name: float(rows[i]) for name, rows in squares.items()}
            _compare_squares(each, expected, eps)
        norms = {
            name: float(self.weights @ rows.clamp(min=0).sqrt().to(self.weights))
            for name, rows in squares.items()
        }
        _compare_totals(total, self.total, norms, eps)


def make_reference(
    parameters: Mapping[str, nn.Parameter], v: Tensor, probe: ForwardProbe
) -> Reference:
    """Go backward from the values v [B] of a forward pass, one example at a time.

    Each has a weight of 1, since a hook need not be linear.

    Args:
        parameters: the trainable ones, by name.
        v: the values. Another forward pass would write over their buffers.
        probe: mode of the forward pass. Checkpointing repeats the pass and compares the modes.
    """

    def go_back(weights: Tensor) -> dict[str, Tensor]:
        pop_grads(parameters)
        with probe, preserve_grads([v], but=parameters.values()):
            repeat_backward([v], [weights])
        return pop_grads(parameters)

    weights = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = []
    for i, weight in enumerate(weights.tolist()):
        mask = torch.zeros_like(v)
        mask[i] = 1
        gradients = go_back(mask)
        squares.append({name: _norm(g) ** 2 for name, g in gradients.items()})
        for name, g in gradients.items():
            total[name].add_(g, alpha=weight)
    together = {name: _SHRINK * g for name, g in go_back(weights / _SHRINK).items()}
    return Reference(v, squares, weights, total, together)


def pop_grads(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return `.grad` of each parameter, or zeros, and clear it."""
    grads = {}
    for name, p in parameters.items():
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return grads


def _compare_squares(
    squares: Mapping[str, float], expected: Mapping[str, float], eps: float
) -> None:
    """Compare |g_i|^2 of one example, by parameter."""
    for name, right in expected.items():
        square = squares.get(name, 0.0)
        slack = min(0.2, 20 * eps**0.5) * max(right, square)
        if abs(square - right) > slack + eps**1.5 * sum(expected.values()):
            raise UnplacedError(
                f"The ledger finds {square:.6g} for the squared gradient of {name} of one example. "
                f"Plain autograd finds {right:.6g}. {_UNCONFIRMED}"
            )


def _compare_totals(
    totals: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    norms: Mapping[str, float],
    eps: float,
) -> None:
    """Compare sum_i c_i g_i, given the sums of c_i |g_i| as norms.

    The tolerance follows from the terms of a sum, and a little from all parameters together: large
    numbers that cancel can leave a remainder where the exact gradient is 0.
    """
    size = math.hypot(*norms.values())
    for name, right in expected.items():
        distance = _norm(totals[name] - right)
        if distance > eps**0.5 * norms.get(name, 0.0) + eps**0.75 * size:
            raise UnplacedError(
                f"The ledger finds another gradient of {name} for a few examples than plain "
                f"autograd. The norm of their difference is {distance:.3g}; the norm of autograd's "
                f"gradient is {_norm(right):.3g}. {_UNCONFIRMED}"
            )


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
