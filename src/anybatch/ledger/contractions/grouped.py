"""`grouped_mm`: products of rows with one of several matrices, as in a mixture of experts.

    y_r = x_r W[e_r],      g_i[e] = sum over rows r of example i with e_r = e of  x_r d_r^T

r is a row, e_r its matrix, d_r = dL/dy_r. Only rows with the same matrix meet in a norm:

    |g_i|^2 = sum_rs  [e_r = e_s] (x_r . x_s) (d_r . d_s)
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from anybatch._torch import grouped_mm as torch_grouped_mm
from anybatch.ledger.contractions.base import Contraction, Detach, RuleResult, widen

__all__ = ["GroupedProduct", "multiply_groups"]


def multiply_groups(
    detach: Detach,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Any = None,
) -> RuleResult | None:
    """Compute `torch.nn.functional.grouped_mm` of rows with parameters; None: in another form."""
    if mat_a.ndim != 2 or mat_b.ndim != 3 or offs is None or bias is not None:
        return None
    output = torch_grouped_mm(mat_a, detach(mat_b), offs=offs, out_dtype=out_dtype)
    rows = torch.arange(len(mat_a), device=mat_a.device, dtype=offs.dtype)
    matrices = torch.searchsorted(offs, rows, right=True)

    def make(d: Tensor, x: Tensor, e: Tensor) -> Contraction:
        size = len(e)
        x, d = x.reshape(size, -1, x.shape[-1]), d.reshape(size, -1, d.shape[-1])
        return GroupedProduct(x, d, e.reshape(size, -1), len(mat_b))

    return RuleResult(output, 1, (mat_a, matrices), [(mat_b, make)])


@final
@dataclass(frozen=True, slots=True)
class GroupedProduct(Contraction):
    """Use of matrices [E, d, p] by rows x [B, T, d] that become rows with gradients d [B, T, p]."""

    x: Tensor
    d: Tensor
    e: Tensor  # [B, T], the matrix of each row
    num_matrices: int

    def gradients(self) -> Tensor:
        return torch.stack([self.x.mT @ (self.d * mask) for mask in self._masks()], 1)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        d = self.d if c is None else self.d * c.to(self.d.dtype)[:, None, None]
        x = self.x.flatten(0, 1)
        return torch.stack([x.T @ (d * mask).flatten(0, 1) for mask in self._masks()])

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.sum_gradients(c), self.square_norms()

    def square_norms(self) -> Tensor:
        x, d = widen(self.x), widen(self.d)
        gram: Tensor = (x @ x.mT) * (d @ d.mT)
        is_same = self.e[:, :, None] == self.e[:, None, :]
        return (gram * is_same).sum((1, 2)).clamp(min=0)

    def _masks(self) -> list[Tensor]:
        """List the rows [B, T, 1] of each matrix."""
        return [(self.e == k).to(self.d.dtype)[:, :, None] for k in range(self.num_matrices)]
