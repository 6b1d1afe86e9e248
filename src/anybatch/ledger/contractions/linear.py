"""Products with a matrix: linear layers, `matmul`, `addmm`.

    y_it = W a_it + b,      g_i = sum_t  d_it a_it^T  (of W),    sum_t d_it  (of b)

i is an example, t one of its T rows (tokens), d_it = dL/dy_it. For T = 1

    |g_i|^2 = |a_i|^2 |d_i|^2,        <g_i, D> = <a_i, d_i^T D>

For small T, Gram matrices are cheaper than the g_i themselves:

    |g_i|^2 = sum_st (a_is . a_it) (d_is . d_it)

Sources: Goodfellow 2015, 1510.01799 (T = 1); Rochette et al. 2019, 1912.06015 (Gram).
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch._torch import unsafe_view
from anybatch.kernels import operations
from anybatch.kernels.choice import allocate, has_alternative, multiply, run_fastest
from anybatch.ledger.contractions.base import (
    Broadcast,
    Contraction,
    Detach,
    PerExample,
    RuleResult,
    dot_rows,
    square_norms,
)
from anybatch.ledger.contractions.projection import Projection

__all__ = ["Product", "addmm", "linear", "make_row_uses", "matmul"]

_TRANSFORM = 16  # operations for each number of a Fourier transform, roughly
_ELEMENTS = 2**22  # of transforms in memory at once


def linear(detach: Detach, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> RuleResult:
    """Compute `torch.nn.functional.linear`."""
    constants = detach(weight), None if bias is None else detach(bias)
    output = None
    if has_alternative(input, weight):
        output = operations.linear(input, *constants)
    if output is None:
        output = F.linear(input, *constants)
    return make_row_uses(output, input, weight, bias, is_transposed=False)


def matmul(detach: Detach, input: Tensor, other: Tensor) -> RuleResult | None:
    """Compute `torch.matmul(inputs, parameter)`; None: the parameter is no matrix."""
    if other.ndim != 2 or input.ndim < 2:
        return None
    output = torch.matmul(input, detach(other))
    return make_row_uses(output, input, other, None, is_transposed=True)


def addmm(
    detach: Detach, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> RuleResult | None:
    """Compute `torch.addmm(bias, rows, parameter)`, as in GPT-2; None: in another form."""
    if input.ndim != 1 or beta != 1 or alpha != 1:
        return None
    output = torch.addmm(detach(input), mat1, detach(mat2))
    return make_row_uses(output, mat1, mat2, input, is_transposed=True)


def make_row_uses(
    output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, is_transposed: bool
) -> RuleResult:
    """Return the uses of a matrix and a bias that map rows [.., d] to an output [.., p]."""

    def make_product(d: Tensor, a: Tensor) -> Contraction:
        return Product(_flatten_rows(a), _flatten_rows(d), is_transposed)

    def make_broadcast(d: Tensor, a: Tensor) -> Contraction:
        return Broadcast(_flatten_rows(d), (d.shape[-1],))

    if output._is_view():  # an operation in place would copy the gradient of a view
        output = unsafe_view(output, output.shape)
    uses = [(weight, make_product)]
    if bias is not None:
        uses.append((bias, make_broadcast))
    return RuleResult(output, output.ndim - 1, (inputs,), uses)


def _flatten_rows(tensor: Tensor) -> Tensor:
    """Reshape [B, ..., d] to [B, T, d]."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


@final
@dataclass(frozen=True, slots=True)
class Product(Contraction):
    """Use of a matrix by rows a [B, T, d] that become rows with gradients d [B, T, p]."""

    a: Tensor
    d: Tensor
    is_transposed: bool  # the matrix is [d, p], not [p, d]
    d_squares: Tensor | None = None  # |d_i|^2 [B], if it is known and is_outer

    def gradients(self) -> Tensor:
        left, right = self._sides(self.d)
        g = allocate((len(self), left.shape[2], right.shape[2]), self.a)
        return torch.bmm(left.transpose(1, 2), right, out=g)

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        d = self.d if c is None else self.d * c.to(self.d.dtype)[:, None, None]
        left, right = self._sides(d)
        return multiply(left.flatten(0, 1).T, right.flatten(0, 1).T)

    def square_norms(self) -> Tensor:
        if self.is_outer:
            d_squares = self.d_squares
            if d_squares is None:
                d_squares = square_norms(self.d[:, 0])
            return square_norms(self.a[:, 0]) * d_squares
        has_gram = self._gram_cost < self._block_cost and self.a.dtype.itemsize >= 4
        if not self._is_in_cache:
            return self._square_by_gram() if has_gram else super(Product, self).square_norms()
        ways = {"gram": self._square_by_gram} if has_gram else {}
        ways["blocks"] = lambda: self._sum_blocks(None, has_sum=False)[1]
        return run_fastest("squares", self.a, self._sizes, ways)

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        def compute_apart() -> tuple[Tensor, Tensor]:
            return self.sum_gradients(c), self.square_norms()

        if self.is_outer or not self._is_in_cache:
            return compute_apart()
        ways = {"blocks": lambda: self._sum_blocks(c), "apart": compute_apart}
        if 4 * self._gram_cost < self._block_cost:
            ways = {"apart": compute_apart, **ways}
        return run_fastest("total and squares", self.a, self._sizes, ways)

    def dot(self, direction: Tensor) -> Tensor:
        matrix = direction.T if self.is_transposed else direction  # [p, d]
        rows = multiply(self.a.conj().flatten(0, 1), matrix)
        return dot_rows(rows.view_as(self.d), self.d)

    def project(self, projection: Projection) -> tuple[Tensor, Contraction]:
        _, t, d, p = self._sizes
        if self.a.is_complex() or t * (d + p + _TRANSFORM * projection.size) > d * p:
            return super(Product, self).project(projection)
        few = max(1, _ELEMENTS // (t * projection.size))
        pieces = zip(*(torch.split(side, few) for side in self._sides(self.d)), strict=True)
        return torch.cat([projection.project_products(*sides) for sides in pieces]), self

    def compact(self) -> Contraction:
        _, t, d, p = self._sizes
        return self if self.is_outer or t * (d + p) < d * p else PerExample(self.gradients())

    @property
    def is_outer(self) -> bool:
        """True if each g_i is the outer product of two vectors."""
        return self.a.shape[1] == 1

    def _sides(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of g_i = left_i^T right_i."""
        return (self.a, d) if self.is_transposed else (d, self.a)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (*self.a.shape, self.d.shape[2])

    @property
    def _gram_cost(self) -> int:
        """Multiplications per example with Gram matrices."""
        _, t, d, p = self._sizes
        return t * t * (d + p)

    @property
    def _block_cost(self) -> int:
        """Multiplications per example with each g_i computed."""
        _, t, d, p = self._sizes
        return t * d * p

    @property
    def _is_in_cache(self) -> bool:
        """True if one g_i at a time can be fast: on the CPU, in types wide enough for sums."""
        return self.a.device.type == "cpu" and self.a.dtype.itemsize >= 4

    def _square_by_gram(self) -> Tensor:
        a, d = (t @ t.mH for t in (self.a, self.d))
        return dot_rows(a.conj(), d).clamp(min=0)

    def _sum_blocks(self, c: Tensor | None, *, has_sum: bool = True) -> tuple[Tensor, Tensor]:
        """Compute each g_i in the same memory, and add and square it while it is in cache."""
        left, right = self._sides(self.d)
        total = left.new_zeros(left.shape[2], right.shape[2])
        g, squares = torch.empty_like(total), []
        factors = [1.0] * len(self) if c is None else c.tolist()
        for rows, columns, factor in zip(left, right, factors, strict=True):
            torch.mm(rows.T, columns, out=g)
            squares.append(torch.vdot(g.view(-1), g.view(-1)).real)
            if has_sum:
                total.add_(g, alpha=factor)
        return total, torch.stack(squares)
