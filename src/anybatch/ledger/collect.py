"""What a backward pass brings of each parameter, turned into sums and figures of each example.

A parameter that is used once is done with as soon as its gradient arrives. One that is used several
times waits for all of them: |sum of g|^2 is not the sum of |g|^2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybatch.ledger.contractions import merged
from anybatch.ledger.contractions.base import Contraction, pieces, square, total_and_squares
from anybatch.ledger.contractions.elementwise import Broadcast, Ready

__all__ = ["Collected", "Collector", "inner", "total"]


@dataclass(frozen=True, slots=True)
class Collected:
    """Figures of B examples, by parameter."""

    totals: dict[str, Tensor] = field(default_factory=dict)  # sum_i c_i g_i
    squares: dict[str, Tensor] = field(default_factory=dict)  # |g_i|^2, [B]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # g_i, [B, ...], where asked for
    uses: dict[str, list[Contraction]] = field(default_factory=dict)  # where they are kept


class Collector:
    """Takes contractions as they arrive.

    Args:
        weights: c [B]; None: 1 each.
        weigh: c from sum |g_i|^2 over all parameters [B], where they are not known before.
        keep: whether uses are kept, for inner products.
        whole: whether each example's gradient is kept.
        earlier: uses of the same examples that earlier backward passes have reached. They belong
            to the squares, and not to the totals.
    """

    def __init__(
        self,
        weights: Tensor | None,
        weigh: Callable[[Tensor], Tensor] | None = None,
        *,
        keep: bool,
        whole: bool,
        earlier: Mapping[str, list[Contraction]] | None = None,
    ) -> None:
        self.found = Collected()
        self._weights = weights
        self._weigh = weigh
        self.keep = keep
        """Whether uses that settle from now on are kept."""
        self._whole = whole
        self._earlier = earlier or {}
        self._waiting: dict[str, list[Contraction]] = {}

    def arrive(self, name: str, make: Callable[[], Contraction], num_uses: int | None) -> None:
        """One use of a parameter; so many are expected in all, None: it is not known."""
        waiting = self._waiting.setdefault(name, [])
        waiting.append(make())
        if len(waiting) == num_uses:
            self.settle(name)

    def expects_more(self, num_uses: Mapping[str, int]) -> bool:
        """Whether fewer uses of a parameter have arrived than there are."""
        return any(len(uses) < num_uses.get(name, 0) for name, uses in self._waiting.items())

    def take(self, name: str) -> list[Contraction]:
        """What has arrived of one, which is then forgotten."""
        return self._waiting.pop(name, [])

    @torch.no_grad()
    def finish(self) -> Collected:
        """Settle what fewer uses have reached than were counted: a branch without a gradient."""
        for name in list(self._waiting):
            self.settle(name)
        found = self.found
        if self._weigh is not None:
            weights = self._weigh(torch.stack(list(found.squares.values())).sum(0))
            for name, uses in found.uses.items():
                found.totals[name] = total(uses, weights)
        if not self.keep:
            found.uses.clear()
        return found

    def settle(self, name: str) -> None:
        """Turn all that has arrived of a parameter into figures, in a backward pass or after it."""
        uses, found = merged(self._waiting.pop(name)), self.found
        if self._whole:
            found.gradients[name] = _whole(uses)
            if len(uses) > 1 or not uses[0].is_outer:
                uses = [Ready(found.gradients[name])]
        if self.keep or self._weigh is not None:
            uses = [use.kept() for use in uses]
            found.uses[name] = uses
        if self._weigh is not None:
            found.squares[name] = _squares(uses)
        elif len(uses) == 1:
            found.totals[name], found.squares[name] = uses[0].total_and_squares(self._weights)
        else:
            found.totals[name], found.squares[name] = total_and_squares(uses, self._weights)
        if name in self._earlier:
            found.squares[name] = _squares(merged([*self._earlier[name], *uses]))


def total(uses: list[Contraction], weights: Tensor | None) -> Tensor:
    """sum_i c_i g_i over all uses."""
    sums = [use.total(weights) for use in uses]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def inner(uses: list[Contraction], direction: Tensor) -> Tensor:
    """<g_i, direction> over all uses, [B]."""
    return torch.stack([use.wide().inner(direction) for use in uses]).sum(0)


def _whole(uses: list[Contraction]) -> Tensor:
    """g_i of their sum, in memory of its own."""
    found = uses[0].gradients()
    if len(uses) == 1 and isinstance(uses[0], Ready | Broadcast):  # of the way back, not its own
        return found.clone(memory_format=torch.contiguous_format)
    for use in uses[1:]:
        found = found + use.gradients()
    return found.contiguous()


def _squares(uses: list[Contraction]) -> Tensor:
    if len(uses) == 1:
        return uses[0].squares()
    return torch.cat([square(g) for _, _, g in pieces(uses)])
