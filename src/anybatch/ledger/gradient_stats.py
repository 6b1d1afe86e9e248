"""Sums and norms of gradients, from contractions as they arrive in a backward pass.

    sum_i c_i g_i,    |g_i|^2,    g_i the sum over all uses of a parameter

A parameter with one use is finished when its gradient arrives. One with several waits for all of
them, since |sum of g|^2 is not the sum of |g|^2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import (
    Broadcast,
    Contraction,
    PerExample,
    iterate_gradients,
    square_norms,
    sum_and_square,
)
from anybatch.ledger.contractions.calls import ParameterTracker
from anybatch.ledger.contractions.derived import Derived
from anybatch.ledger.contractions.linear import Product
from anybatch.ledger.contractions.projection import draw_projection

__all__ = ["GradientCollector", "GradientStats", "Projector", "add_up", "dot_uses"]


@dataclass(frozen=True, slots=True)
class GradientStats:
    """Sums and norms of the gradients of B examples, by parameter."""

    totals: dict[str, Tensor] = field(default_factory=dict)  # sum_i c_i g_i
    squares: dict[str, Tensor] = field(default_factory=dict)  # |g_i|^2, [B]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # g_i, [B, ...], on request
    uses: dict[str, list[Contraction]] = field(default_factory=dict)  # for inner products
    projections: Tensor | None = None  # random projections of g_i, [B, k], on request


@dataclass(frozen=True, slots=True)
class Projector:
    """Random projections of the gradients of parameters to k numbers."""

    parameters: Mapping[str, Tensor]
    size: int  # k

    def project(self, name: str, uses: list[Contraction]) -> tuple[Tensor, list[Contraction]]:
        """Project the gradient over all uses of a parameter [B, k]; return it and the uses."""
        p = self.parameters[name]
        shape = (*p.shape, 2) if p.is_complex() else tuple(p.shape)
        projection = draw_projection(name, shape, self.size, p.device)
        results = [use.widen().project(projection) for use in uses]
        total = torch.stack([projected for projected, _ in results]).sum(0)
        return total, [use for _, use in results]


def add_up(total: Tensor | None, part: Tensor) -> Tensor:
    """Add a part to a total, which begins as None."""
    return part if total is None else total + part


class GradientCollector:
    """Collects contractions as they arrive, and computes sums and norms.

    Args:
        weights: c [B]; None: 1 each.
        weigh: computes c from sum |g_i|^2 over all parameters [B], if c depends on them.
        keep_uses: whether to keep the uses, for inner products.
        keep_gradients: whether to keep the gradient of each example.
        projector: projects the gradient of each example, if requested.
        earlier: uses of the same examples in earlier backward passes. They count in the norms, but
            not in the sums.
        has_sums: whether to compute sums; if not, autograd does.
    """

    def __init__(
        self,
        weights: Tensor | None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        *,
        keep_uses: bool,
        keep_gradients: bool,
        projector: Projector | None = None,
        earlier: Mapping[str, list[Contraction]] | None = None,
        has_sums: bool = True,
    ) -> None:
        self.keep_uses, self._has_sums = keep_uses, has_sums
        self._stats = GradientStats()
        self._weights, self._weigh = weights, weigh
        self._keep_gradients, self._projector = keep_gradients, projector
        self._projections: Tensor | None = None
        self._earlier = earlier or {}
        self._pending: dict[str, list[Contraction]] = {}

    def add(self, name: str, use: Contraction, num_uses: int | None) -> None:
        """Add one use of a parameter; `num_uses` is the number to expect, None if unknown."""
        pending = self._pending.setdefault(name, [])
        pending.append(use)
        if len(pending) == num_uses:
            self._finish_parameter(name)

    def expects_more(self, num_uses: Mapping[str, int]) -> bool:
        """Return whether some parameter has fewer uses so far than it will have."""
        return any(len(uses) < num_uses.get(name, 0) for name, uses in self._pending.items())

    def move_to_parameters(self, tracker: ParameterTracker) -> None:
        """Replace uses of derived tensors by uses of the parameters they were computed from."""
        for name, tensor in tracker.derived.items():
            for use in self._pending.pop(name, []):
                for root in tracker.roots[name]:
                    p = tracker.parameters[root]
                    self._pending.setdefault(root, []).append(Derived(p, tensor, use))

    @torch.no_grad()
    def finish(self) -> GradientStats:
        """Finish all parameters, including those that received fewer gradients than uses."""
        for name in list(self._pending):
            self._finish_parameter(name)
        stats = self._stats
        if self._weigh is not None:
            weights = self._weigh(torch.stack(list(stats.squares.values())).sum(0))
            for name, uses in stats.uses.items():
                stats.totals[name] = _sum_uses(uses, weights)
        if not self.keep_uses:
            stats.uses.clear()
        return replace(stats, projections=self._projections)

    def _finish_parameter(self, name: str) -> None:
        uses, stats = _merge_products(self._pending.pop(name)), self._stats
        if self._keep_gradients:
            stats.gradients[name] = _sum_gradients(uses)
            if len(uses) > 1 or not uses[0].is_outer:
                uses = [PerExample(stats.gradients[name])]
        if self._projector is not None:
            projected, uses = self._projector.project(name, uses)
            self._projections = add_up(self._projections, projected)
        if self.keep_uses or self._weigh is not None:
            uses = [use.compact() for use in uses]
            stats.uses[name] = uses
        if self._weigh is not None or not self._has_sums:
            stats.squares[name] = _square_uses(uses)
        elif len(uses) == 1:
            stats.totals[name], stats.squares[name] = uses[0].sum_and_square(self._weights)
        else:
            stats.totals[name], stats.squares[name] = sum_and_square(uses, self._weights)
        if name in self._earlier:
            stats.squares[name] = _square_uses(_merge_products([*self._earlier[name], *uses]))


def _merge_products(uses: list[Contraction]) -> list[Contraction]:
    """Merge all products with the same matrix into one, by concatenating their rows."""
    if len(uses) == 1:
        return uses
    products: dict[bool, list[Product]] = {}
    others: list[Contraction] = []
    for use in uses:
        if isinstance(use, Product):
            products.setdefault(use.is_transposed, []).append(use)
        else:
            others.append(use)
    merged = [
        group[0]
        if len(group) == 1
        else Product(
            torch.cat([use.a for use in group], 1), torch.cat([use.d for use in group], 1), key
        )
        for key, group in products.items()
    ]
    return [*merged, *others]


def _sum_uses(uses: list[Contraction], weights: Tensor | None) -> Tensor:
    """Compute sum_i c_i g_i over all uses."""
    sums = [use.sum_gradients(weights) for use in uses]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def dot_uses(uses: list[Contraction], direction: Tensor, stride: int = 1) -> Tensor:
    """Compute <g_i, direction> over all uses, of every stride-th example."""
    some = [use if stride == 1 else use.take(0, len(use), stride) for use in uses]
    return torch.stack([use.widen().dot(direction) for use in some]).sum(0)


def _sum_gradients(uses: list[Contraction]) -> Tensor:
    """Compute g_i over all uses, in memory that no one else holds."""
    g = uses[0].gradients()
    if len(uses) == 1 and isinstance(uses[0], PerExample | Broadcast):  # autograd's own memory
        return g.clone(memory_format=torch.contiguous_format)
    for use in uses[1:]:
        g = g + use.gradients()
    return g.contiguous()


def _square_uses(uses: list[Contraction]) -> Tensor:
    if len(uses) == 1:
        return uses[0].square_norms()
    return torch.cat([square_norms(g) for _, _, g in iterate_gradients(uses)])
