"""Look-ups: rows of a matrix, chosen by index.

    y_it = W[j_it],      g_i[v] = sum over t with j_it = v of d_it

The gradient of an example has only the rows that it looks up: pairs (i, v) are sorted, and the d of
each added up, so that no [B, V, d] is made for the norms.
"""

from dataclasses import dataclass
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.errors import LedgerError
from anybatch.ledger.contractions.base import Const, Contraction, Met, dots, square

__all__ = ["LookUp", "embedding", "index_select", "indexed"]


_INTEGERS = {torch.int32, torch.int64}


@final
@dataclass(frozen=True, slots=True)
class LookUp(Contraction):
    """Use of a matrix [V, d] by indices j [B, T] that become rows with gradients d [B, T, d]."""

    j: Tensor
    d: Tensor
    shape: tuple[int, ...]  # of the matrix; rows may be tensors themselves
    padding: int | None = None  # the row that gets no gradient

    def __len__(self) -> int:
        return len(self.j)

    def take(self, start: int, stop: int) -> Self:
        return type(self)(self.j[start:stop], self.d[start:stop], self.shape, self.padding)

    def gradients(self) -> Tensor:
        size, width = len(self.j), self.d.shape[2]
        flat = self.d.new_zeros(size * self.num_rows, width)
        places = self._places()
        flat.index_add_(0, places.flatten(), self._counted().flatten(0, 1))
        return flat.view(size, *self.shape)

    def total(self, c: Tensor | None) -> Tensor:
        d = self._counted()
        d = d if c is None else d * c.to(d.dtype)[:, None, None]
        rows = d.new_zeros(self.num_rows, d.shape[2])
        return rows.index_add_(0, self.j.flatten(), d.flatten(0, 1)).view(self.shape)

    def squares(self) -> Tensor:
        pairs, owner = torch.unique(self._places(), return_inverse=True)
        d = self._counted().flatten(0, 1)
        wide = d if d.dtype.itemsize >= 4 else d.float()
        sums = wide.new_zeros(len(pairs), wide.shape[1]).index_add_(0, owner.flatten(), wide)
        examples = torch.div(pairs, self.num_rows, rounding_mode="floor")
        squares = square(sums)
        return squares.new_zeros(len(self.j)).index_add_(0, examples, squares)

    def inner(self, direction: Tensor) -> Tensor:
        return dots(direction.flatten(1)[self.j], self._counted())

    @property
    def num_rows(self) -> int:
        """V."""
        return self.shape[0]

    def _places(self) -> Tensor:
        first = torch.arange(len(self.j), device=self.j.device)[:, None] * self.num_rows
        return self.j + first

    def _counted(self) -> Tensor:
        if self.padding is None:
            return self.d
        return self.d * (self.j != self.padding)[:, :, None].to(self.d.dtype)


def embedding(
    const: Const,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Met:
    """`torch.nn.functional.embedding`; rows are renormalised before, as torch does.

    Raises:
        LedgerError: gradients are divided by how often a row is in the batch.
    """
    if scale_grad_by_freq:
        raise LedgerError(
            "an embedding divides its gradient by how often a row is looked up in the batch, so "
            "that no gradient belongs to one example alone, expected scale_grad_by_freq=False."
        )
    output = F.embedding(input, const(weight), padding_idx, max_norm, norm_type)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(weight)

    def look_up(d: Tensor, j: Tensor) -> Contraction:
        return _look_up(d, j, weight, padding)

    return Met(output, input.ndim, (input,), [(weight, look_up)])


def indexed(const: Const, rows: Tensor, index: Any) -> Met | None:
    """`parameter[index]`, the index a tensor of row numbers; None: in another form."""
    is_integer = isinstance(index, Tensor) and index.ndim > 0 and index.dtype in _INTEGERS
    if not is_integer or const(rows) is rows or rows.ndim == 0:
        return None
    output = const(rows)[index]

    def look_up(d: Tensor, j: Tensor) -> Contraction:
        return _look_up(d, j % len(rows), rows, None)

    return Met(output, index.ndim, (index,), [(rows, look_up)])


def index_select(const: Const, input: Tensor, dim: int, index: Tensor) -> Met | None:
    """`parameter.index_select(0, index)`; None: along another dimension."""
    return indexed(const, input, index) if dim in (0, -input.ndim) and index.ndim else None


def _look_up(d: Tensor, j: Tensor, weight: Tensor, padding: int | None) -> LookUp:
    size = len(j)
    j = j.reshape(size, -1)
    return LookUp(j, d.reshape(size, j.shape[1], -1), tuple(weight.shape), padding)
