"""Elementwise use of a parameter, broadcast over the batch: `x + p`, `x * p`, biases and scales.

    g_i = sum of u_i over the dimensions along which p is repeated,    u_i = d_i * dy/dp

d_i = dL/dy of example i.

Gradients of each example that autograd has made itself.

    P_i = p for each example i,    y = f(x, P) in place of f(x, p):    g_i = dL/dP_i

For elementwise operations the copies P are a view that broadcasts, and autograd sums over whatever
else p is repeated along; any other operation is mapped over the examples.
"""

from dataclasses import dataclass
from typing import Self, final

from torch import Tensor

from anybatch.ledger.contractions.base import Contraction, square

__all__ = ["Broadcast", "Ready"]


@final
@dataclass(frozen=True, slots=True)
class Broadcast(Contraction):
    """Use of a parameter of some shape by u [B, ...], which ends in what it stretches to."""

    u: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.u)

    def take(self, start: int, stop: int) -> Self:
        return type(self)(self.u[start:stop], self.shape)

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return Ready(self.gradients()).total_and_squares(c)

    def kept(self) -> Contraction:
        return Ready(self.gradients())

    def gradients(self) -> Tensor:
        own = self.u.ndim - 1
        kept = (1,) * (own - len(self.shape)) + self.shape[max(0, len(self.shape) - own) :]
        repeated = [k + 1 for k in range(own) if kept[k] == 1 and self.u.shape[k + 1] != 1]
        summed = self.u.sum(repeated, keepdim=True) if repeated else self.u
        return summed.reshape(len(self.u), *self.shape)


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
