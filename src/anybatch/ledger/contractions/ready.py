"""Gradients of each example that autograd has made itself.

    P_i = p for each example i,    y = f(x, P) in place of f(x, p):    g_i = dL/dP_i

For elementwise operations the copies P are a view that broadcasts, and autograd sums over whatever
else p is repeated along; any other operation is mapped over the examples.
"""

from dataclasses import dataclass
from typing import Self, final

from torch import Tensor

from anybatch.ledger.contractions.base import Contraction, square

__all__ = ["Ready"]


@final
@dataclass(frozen=True, slots=True)
class Ready(Contraction):
    """g [B, ...], shaped like the parameter."""

    g: Tensor

    def __len__(self) -> int:
        return len(self.g)

    def take(self, start: int, stop: int) -> Self:
        return type(self)(self.g[start:stop])

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = self.g.reshape(len(self), -1)
        total = flat.sum(0) if c is None else c.to(flat.dtype) @ flat
        return total.view(self.g.shape[1:]), square(flat)

    def gradients(self) -> Tensor:
        return self.g
