"""Tensors computed from parameters alone: weight norm, a slice, a low-rank product.

    M = f(p):      g_i (of p) = (df/dp)^T g_i (of M)

The batch meets M in an operation. The ledger treats M like a parameter and leads the gradients of M
back to p afterwards.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction

__all__ = ["Derived", "ignore_vmap_warning"]


@final
@dataclass(frozen=True, slots=True)
class Derived(Contraction):
    """Use of a parameter through a tensor that was computed from it."""

    parameter: Tensor
    tensor: Tensor  # with a graph that leads to the parameter
    use: Contraction  # of the tensor

    def __len__(self) -> int:
        return len(self.use)

    def take(self, start: int, stop: int, step: int = 1) -> Self:
        return replace(self, use=self.use.take(start, stop, step))

    def gradients(self) -> Tensor:
        return self._go_back(self.use.gradients(), batched=True)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        return self._go_back(self.use.sum_gradients(c), batched=False)

    def widen(self) -> Self:
        return replace(self, use=self.use.widen())

    def _go_back(self, d: Tensor, *, batched: bool) -> Tensor:
        with torch.enable_grad(), ignore_vmap_warning():
            (gradient,) = torch.autograd.grad(
                self.tensor,
                self.parameter,
                d.to(self.tensor.dtype),
                retain_graph=True,
                is_grads_batched=batched,
            )
        return gradient


@contextmanager
def ignore_vmap_warning() -> Iterator[None]:
    """Ignore the warning that vmap runs an operation in a loop; the result is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
