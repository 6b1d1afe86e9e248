"""Products with a matrix: linear layers, `matmul`, `addmm`.

    y_it = W a_it + b,      g_i = sum_t  d_it a_it^T  (of W),    sum_t d_it  (of b)

i an example, t one of its T rows (tokens), d_it = dL/dy_it. For T = 1

    |g_i|^2 = |a_i|^2 |d_i|^2,        <g_i, D> = <a_i, d_i^T D>

and for small T the Gram matrices are shorter than the g_i themselves:

    |g_i|^2 = sum_st (a_is . a_it) (d_is . d_it)

Sources: Goodfellow 2015, 1510.01799 (T = 1); Rochette et al. 2019, 1912.06015 (Gram).
"""

from dataclasses import dataclass
from typing import Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch._torch import unsafe_view
from anybatch.kernels import operations
from anybatch.kernels.choice import empty, fastest, product
from anybatch.ledger.contractions.base import Contraction, dots, square
from anybatch.ledger.contractions.broadcast import Broadcast
from anybatch.ledger.contractions.ready import Ready
from anybatch.ledger.met import Const, Met

__all__ = ["Product", "addmm", "linear", "matmul", "met_by_rows"]


@final
@dataclass(frozen=True, slots=True)
class Product(Contraction):
    """Use of a matrix by rows a [B, T, d] that become rows with gradients d [B, T, p]."""

    a: Tensor
    d: Tensor
    is_transposed: bool  # the matrix is [d, p], not [p, d]

    def __len__(self) -> int:
        return len(self.a)

    def take(self, start: int, stop: int) -> Self:
        return type(self)(self.a[start:stop], self.d[start:stop], self.is_transposed)

    def gradients(self) -> Tensor:
        left, right = (self.a, self.d) if self.is_transposed else (self.d, self.a)
        found = empty((len(self), left.shape[2], right.shape[2]), self.a)
        return torch.bmm(left.transpose(1, 2), right, out=found)

    def total(self, c: Tensor | None) -> Tensor:
        d = self.d if c is None else self.d * c.to(self.d.dtype)[:, None, None]
        left, right = (self.a, d) if self.is_transposed else (d, self.a)
        return product(left.flatten(0, 1).T, right.flatten(0, 1).T)

    def squares(self) -> Tensor:
        if self.is_outer:
            return square(self.a) * square(self.d)
        is_short = self._gram_costs < self._block_costs and self.a.dtype.itemsize >= 4
        if not self._is_in_cache:
            return self._gram() if is_short else super(Product, self).squares()
        ways = {"gram": self._gram} if is_short else {}
        ways["blocks"] = lambda: self._blocks(None, has_total=False)[1]
        return fastest("squares", self.a, self._sizes, ways)

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both, each g_i made once where that is shorter."""

        def apart() -> tuple[Tensor, Tensor]:
            return self.total(c), self.squares()

        if self.is_outer or not self._is_in_cache:
            return apart()
        ways = {"blocks": lambda: self._blocks(c), "apart": apart}
        if 4 * self._gram_costs < self._block_costs:
            ways = {"apart": apart, **ways}
        return fastest("total and squares", self.a, self._sizes, ways)

    def inner(self, direction: Tensor) -> Tensor:
        matrix = direction.T if self.is_transposed else direction  # [p, d]
        rows = product(self.a.conj().flatten(0, 1), matrix)
        return dots(rows.view_as(self.d), self.d)

    def kept(self) -> Contraction:
        """The same as it is to be kept for a second look: the g_i where they are smaller."""
        _, t, d, p = self._sizes
        return self if self.is_outer or t * (d + p) < d * p else Ready(self.gradients())

    @property
    def is_outer(self) -> bool:
        """Whether each g_i is the product of a column and a row."""
        return self.a.shape[1] == 1

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (*self.a.shape, self.d.shape[2])

    @property
    def _gram_costs(self) -> int:  # multiplications an example
        _, t, d, p = self._sizes
        return t * t * (d + p)

    @property
    def _block_costs(self) -> int:
        _, t, d, p = self._sizes
        return t * d * p

    @property
    def _is_in_cache(self) -> bool:
        """Whether one g_i at a time is a way: on the CPU, in types wide enough to add up in."""
        return self.a.device.type == "cpu" and self.a.dtype.itemsize >= 4

    def _gram(self) -> Tensor:
        a, d = (t @ t.mH for t in (self.a, self.d))
        return dots(a.conj(), d).clamp(min=0)

    def _blocks(self, c: Tensor | None, *, has_total: bool = True) -> tuple[Tensor, Tensor]:
        """Each g_i in the place of the one before, squared and added up while it is in cache."""
        left, right = (self.a, self.d) if self.is_transposed else (self.d, self.a)
        total = left.new_zeros(left.shape[2], right.shape[2])
        g, squares = torch.empty_like(total), []
        factors = [1.0] * len(self) if c is None else c.tolist()
        for rows, columns, factor in zip(left, right, factors, strict=True):
            torch.mm(rows.T, columns, out=g)
            squares.append(torch.vdot(g.view(-1), g.view(-1)).real)
            if has_total:
                total.add_(g, alpha=factor)
        return total, torch.stack(squares)


def linear(const: Const, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Met:
    """`torch.nn.functional.linear`."""
    constants = const(weight), None if bias is None else const(bias)
    output = operations.linear(input, *constants)
    if output is None:
        output = F.linear(input, *constants)
    return met_by_rows(output, input, weight, bias, is_transposed=False)


def matmul(const: Const, input: Tensor, other: Tensor) -> Met | None:
    """`torch.matmul(inputs, parameter)`, the parameter a matrix."""
    if other.ndim != 2 or input.ndim < 2:
        return None
    return met_by_rows(torch.matmul(input, const(other)), input, other, None, is_transposed=True)


def addmm(
    const: Const,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Met | None:
    """`torch.addmm(bias, rows, parameter)`, as in GPT-2."""
    if input.ndim != 1 or beta != 1 or alpha != 1:
        return None
    output = torch.addmm(const(input), mat1, const(mat2))
    return met_by_rows(output, mat1, mat2, input, is_transposed=True)


def met_by_rows(
    output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, is_transposed: bool
) -> Met:
    """Rows [.., d] that a matrix takes to an output [.., p]."""

    def rows(d: Tensor, a: Tensor) -> Contraction:
        return Product(_rows(a), _rows(d), is_transposed)

    def bare(d: Tensor, a: Tensor) -> Contraction:
        return Broadcast(_rows(d), (d.shape[-1],))

    if output._is_view():  # of the rows: what changes a view in place copies its gradient
        output = unsafe_view(output, output.shape)
    uses = [(weight, rows)]
    if bias is not None:
        uses.append((bias, bare))
    return Met(output, output.ndim - 1, (inputs,), uses)


def _rows(tensor: Tensor) -> Tensor:
    """[B, ..., d] to [B, T, d]."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])
