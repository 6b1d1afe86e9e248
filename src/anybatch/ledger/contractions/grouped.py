"""Products of rows with one matrix of several: the experts of a mixture, `grouped_mm`.

    y_r = x_r W[e_r],      g_i[e] = sum over rows r of example i with e_r = e of  x_r d_r^T

r a row, e_r its matrix, d_r = dL/dy_r. Two rows meet in a norm only if they share a matrix:

    |g_i|^2 = sum_rs  [e_r = e_s] (x_r . x_s) (d_r . d_s)
"""

from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from anybatch._torch import grouped_mm as torch_grouped_mm
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.met import Const, Met

__all__ = ["GroupedProduct", "grouped_mm"]


@final
@dataclass(frozen=True, slots=True)
class GroupedProduct(Contraction):
    """Use of matrices [E, d, p] by rows x [B, T, d] that become rows with gradients d [B, T, p]."""

    x: Tensor
    d: Tensor
    e: Tensor  # [B, T], the matrix of each row
    num_matrices: int

    def __len__(self) -> int:
        return len(self.x)

    def take(self, start: int, stop: int) -> Self:
        x, d, e = (t[start:stop] for t in (self.x, self.d, self.e))
        return type(self)(x, d, e, self.num_matrices)

    def gradients(self) -> Tensor:
        return torch.stack([self.x.mT @ (self.d * own) for own in self._masks()], 1)

    def total(self, c: Tensor | None) -> Tensor:
        d = self.d if c is None else self.d * c.to(self.d.dtype)[:, None, None]
        x = self.x.flatten(0, 1)
        return torch.stack([x.T @ (d * own).flatten(0, 1) for own in self._masks()])

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.total(c), self.squares()

    def squares(self) -> Tensor:
        x, d = (t if t.dtype.itemsize >= 4 else t.float() for t in (self.x, self.d))
        gram = (x @ x.mT) * (d @ d.mT)
        meet = self.e[:, :, None] == self.e[:, None, :]
        return (gram * meet).sum((1, 2)).clamp(min=0)

    def _masks(self) -> list[Tensor]:
        """[B, T, 1] for each matrix: the rows that it takes."""
        return [(self.e == k).to(self.d.dtype)[:, :, None] for k in range(self.num_matrices)]


def grouped_mm(
    const: Const,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Met | None:
    """`torch.nn.functional.grouped_mm` of rows with parameters; None: in another form."""
    if mat_a.ndim != 2 or mat_b.ndim != 3 or offs is None or bias is not None:
        return None
    output = torch_grouped_mm(mat_a, const(mat_b), offs=offs, out_dtype=out_dtype)
    places = torch.arange(len(mat_a), device=mat_a.device, dtype=offs.dtype)
    which = torch.searchsorted(offs, places, right=True)

    def product(d: Tensor, x: Tensor, e: Tensor) -> Contraction:
        size = len(e)
        x, d = x.reshape(size, -1, x.shape[-1]), d.reshape(size, -1, d.shape[-1])
        return GroupedProduct(x, d, e.reshape(size, -1), len(mat_b))

    return Met(output, 1, (mat_a, which), [(mat_b, product)])
