"""Embeddings: rows of a matrix, looked up by index.

    y_it = W[j_it],      g_i[v] = sum over t with j_it = v of d_it

The gradient of an example has only the rows that it looks up. The norms sort the pairs (i, v) and
add up the d of each pair, and need no [B, V, d].
"""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.errors import LedgerError
from anybatch.ledger.contractions.base import (
    Contraction,
    Detach,
    RuleResult,
    dot_rows,
    square_norms,
    widen,
)
from anybatch.ledger.contractions.projection import Projection

__all__ = ["LookUp", "embedding", "index_rows", "index_select"]


def embedding(
    detach: Detach,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> RuleResult:
    """Compute `torch.nn.functional.embedding`, which renormalises the rows first.

    Raises:
        LedgerError: gradients are divided by the count of a row in the batch.
    """
    if scale_grad_by_freq:
        raise LedgerError(
            "An embedding divides the gradient of a row by its count in the batch. No gradient "
            "belongs to one example alone. Use scale_grad_by_freq=False."
        )
    output = F.embedding(input, detach(weight), padding_idx, max_norm, norm_type)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(weight)

    def make(d: Tensor, j: Tensor) -> Contraction:
        return _make_look_up(d, j, weight, padding)

    return RuleResult(output, input.ndim, (input,), [(weight, make)])


def index_rows(detach: Detach, rows: Tensor, index: Any) -> RuleResult | None:
    """Compute `parameter[index]`; None: the index is no tensor of row numbers."""
    is_integer = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    if not is_integer or index.ndim == 0 or detach(rows) is rows or rows.ndim == 0:
        return None
    output = detach(rows)[index]

    def make(d: Tensor, j: Tensor) -> Contraction:
        return _make_look_up(d, j % len(rows), rows, None)

    return RuleResult(output, index.ndim, (index,), [(rows, make)])


def index_select(detach: Detach, input: Tensor, dim: int, index: Tensor) -> RuleResult | None:
    """Compute `parameter.index_select(0, index)`; None: along another dimension."""
    return index_rows(detach, input, index) if dim in (0, -input.ndim) and index.ndim else None


def _make_look_up(d: Tensor, j: Tensor, weight: Tensor, padding: int | None) -> Contraction:
    size = len(j)
    j = j.reshape(size, -1)
    return LookUp(j, d.reshape(size, j.shape[1], -1), tuple(weight.shape), padding)


@final
@dataclass(frozen=True, slots=True)
class LookUp(Contraction):
    """Use of a matrix [V, d] by indices j [B, T] that become rows with gradients d [B, T, d]."""

    j: Tensor
    d: Tensor
    shape: tuple[int, ...]  # of the matrix; its rows can have several dimensions
    padding: int | None = None  # row without a gradient

    def gradients(self) -> Tensor:
        size, width = len(self.j), self.d.shape[2]
        flat = self.d.new_zeros(size * self.num_rows, width)
        flat.index_add_(0, self._pairs().flatten(), self._mask_padding().flatten(0, 1))
        return flat.view(size, *self.shape)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        d = self._mask_padding()
        d = d if c is None else d * c.to(d.dtype)[:, None, None]
        rows = d.new_zeros(self.num_rows, d.shape[2])
        return rows.index_add_(0, self.j.flatten(), d.flatten(0, 1)).view(self.shape)

    def square_norms(self) -> Tensor:
        pairs, places = torch.unique(self._pairs(), return_inverse=True)
        d = widen(self._mask_padding().flatten(0, 1))
        sums = d.new_zeros(len(pairs), d.shape[1]).index_add_(0, places.flatten(), d)
        examples = torch.div(pairs, self.num_rows, rounding_mode="floor")
        squares = square_norms(sums)
        return squares.new_zeros(len(self.j)).index_add_(0, examples, squares)

    def dot(self, direction: Tensor) -> Tensor:
        return dot_rows(direction.reshape(self.num_rows, -1)[self.j], self._mask_padding())

    def project(self, projection: Projection) -> tuple[Tensor, Contraction]:
        if len(self.shape) == 1 or self.d.is_complex():
            return super(LookUp, self).project(projection)
        return projection.project_rows(self.j, self._mask_padding()), self

    @property
    def num_rows(self) -> int:
        """V."""
        return self.shape[0]

    def _pairs(self) -> Tensor:
        """Number the pairs (i, v): i V + v."""
        return self.j + torch.arange(len(self.j), device=self.j.device)[:, None] * self.num_rows

    def _mask_padding(self) -> Tensor:
        """Return d, with zeros for the padding row."""
        if self.padding is None:
            return self.d
        return self.d * (self.j != self.padding)[:, :, None].to(self.d.dtype)
