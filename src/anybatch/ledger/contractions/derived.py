"""A parameter from which what met the batch was made: weight norm, a slice, a low-rank product.

M = f(p):      g_i (of p) = (df/dp)^T g_i (of M)
"""

from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.vmap_fallback import slow_is_fine

__all__ = ["Made"]


@final
@dataclass(frozen=True, slots=True)
class Made(Contraction):
    """Use of a parameter through what was made of it."""

    parameter: Tensor
    made: Tensor  # with its graph, which ends in the parameter
    use: Contraction  # of what was made

    def __len__(self) -> int:
        return len(self.use)

    def take(self, start: int, stop: int) -> Self:
        return replace(self, use=self.use.take(start, stop))

    def gradients(self) -> Tensor:
        return self._back(self.use.gradients(), batched=True)

    def total(self, c: Tensor | None) -> Tensor:
        return self._back(self.use.total(c), batched=False)

    def wide(self) -> Self:
        return replace(self, use=self.use.wide())

    def _back(self, d: Tensor, *, batched: bool) -> Tensor:
        with torch.enable_grad(), slow_is_fine():
            (found,) = torch.autograd.grad(
                self.made,
                self.parameter,
                d.to(self.made.dtype),
                retain_graph=True,
                is_grads_batched=batched,
            )
        return found
