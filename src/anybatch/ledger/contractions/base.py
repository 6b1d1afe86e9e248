"""Base class of contractions: one use of a parameter by B examples.

    gradient of the parameter = sum_i c_i g_i,    g_i the gradient of example i's own value

A contraction stores what the g_i are computed from. Sums, norms and inner products are computed
from the g_i of a few examples at a time, unless a subclass knows a cheaper formula.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self, final

import torch
from torch import Tensor

from anybatch._torch import tree_map
from anybatch.ledger.contractions.projection import Projection

__all__ = [
    "Broadcast",
    "Contraction",
    "Detach",
    "PerExample",
    "Rule",
    "RuleResult",
    "dot_rows",
    "iterate_gradients",
    "square_norms",
    "sum_and_square",
    "widen",
]

_ELEMENTS = 2**22  # of gradients that are in memory at once
_LONG_ROW = 2**14  # elements; above this, one dot product at a time is faster


class Contraction(ABC):
    """One use of a parameter by B examples, after a backward pass has reached it.

    A subclass is a frozen dataclass. Its tensors have the examples first, unless it overrides
    `__len__` and `take`.
    """

    @abstractmethod
    def gradients(self) -> Tensor:
        """Compute g_i: [B, ...], each shaped like the parameter."""

    def __len__(self) -> int:
        """Return B, the length of the first field."""
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def take(self, start: int, stop: int, step: int = 1) -> Self:
        """Return the contraction of examples start .. stop-1 alone, or of every step-th of them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        cut = {name: x[start:stop:step] for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **cut)  # type: ignore[type-var]

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        """Compute sum_i c_i g_i, shaped like the parameter; None means c_i = 1."""
        return _add([_weigh(g, c, a, b) for a, b, g in iterate_gradients([self])])

    def square_norms(self) -> Tensor:
        """Compute |g_i|^2: [B], in at least float32."""
        return torch.cat([square_norms(g) for _, _, g in iterate_gradients([self])])

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute `sum_gradients(c)` and `square_norms()`, and each g_i only once."""
        return sum_and_square([self], c)

    def dot(self, direction: Tensor) -> Tensor:
        """Compute <g_i, direction>: [B]; a complex number counts as two real ones."""
        return torch.cat(
            [dot_rows(g, direction.expand_as(g)) for _, _, g in iterate_gradients([self])]
        )

    def project(self, projection: Projection) -> "tuple[Tensor, Contraction]":
        """Compute the random projection of each g_i [B, k]; return it, and the use with its g_i.

        Sums and norms can then use these g_i. If they are too large to keep, the use is returned
        as it is.
        """
        is_small = len(self) * projection.num_elements <= 4 * _ELEMENTS
        use = PerExample(self.gradients()) if is_small else self
        return projection.project_gradients(g for *_, g in iterate_gradients([use])), use

    @property
    def is_outer(self) -> bool:
        """True if sums and norms need no whole gradients."""
        return False

    def compact(self) -> "Contraction":
        """Return the contraction in the form that needs the least memory."""
        return self

    def widen(self) -> Self:
        """Return the contraction with all tensors in at least float32."""
        wide = {f.name: tree_map(widen, getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **wide)  # type: ignore[type-var]


@final
@dataclass(frozen=True, slots=True)
class PerExample(Contraction):
    """Gradients g [B, ...] of each example, which autograd has computed."""

    g: Tensor
    squares: Tensor | None = None  # |g_i|^2 [B], if they are known

    def __len__(self) -> int:
        return self.g.shape[0]

    def square_norms(self) -> Tensor:
        return square_norms(self.g) if self.squares is None else self.squares

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = self.g.reshape(len(self), -1)
        total = flat.sum(0) if c is None else c.to(flat.dtype) @ flat
        return total.view(self.g.shape[1:]), square_norms(flat)

    def gradients(self) -> Tensor:
        return self.g


@final
@dataclass(frozen=True, slots=True)
class Broadcast(Contraction):
    """Use of a parameter that is broadcast to u [B, ..., *shape]."""

    u: Tensor
    shape: tuple[int, ...]  # of the parameter

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        return PerExample(self.gradients()).sum_and_square(c)

    def compact(self) -> Contraction:
        return PerExample(self.gradients())

    def gradients(self) -> Tensor:
        ndim = self.u.ndim - 1
        aligned = (1,) * (ndim - len(self.shape)) + self.shape[max(0, len(self.shape) - ndim) :]
        repeated = [k + 1 for k in range(ndim) if aligned[k] == 1 and self.u.shape[k + 1] != 1]
        sums = self.u.sum(repeated, keepdim=True) if repeated else self.u
        return sums.reshape(len(self.u), *self.shape)


Detach = Callable[[Tensor], Tensor]
"""Return a parameter as a constant, and any other tensor unchanged."""


class RuleResult(NamedTuple):
    """Result of an operation whose parameters are constants, and the uses of those parameters."""

    output: Tensor
    leading: int  # number of leading dimensions of the output that can hold the examples
    saved: tuple[Tensor, ...]  # tensors that the gradients need, laid out as the output
    uses: list[tuple[Tensor, Callable[..., Contraction]]]
    """Each parameter with a function that makes its contraction from (d, *saved), where d is the
    gradient of the output and all have the examples first."""


Rule = Callable[..., RuleResult | None]
"""Compute an operation from `(detach, *args, **kwargs)`; None: the rule does not cover the call."""


def iterate_gradients(uses: list[Contraction]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, g [b, ...]), a few examples at a time, g added up over the uses."""
    size = len(uses[0])
    start, count = 0, 1
    while start < size:
        stop = min(start + count, size)
        g = uses[0].take(start, stop).gradients()
        for use in uses[1:]:
            g = g + use.take(start, stop).gradients()
        yield start, stop, g
        start, count = stop, max(1, _ELEMENTS * len(g) // max(1, g.numel()))


def sum_and_square(uses: list[Contraction], c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute sum_i c_i g_i and |g_i|^2, where g_i is the sum over several uses."""
    sums, squares = [], []
    for a, b, g in iterate_gradients(uses):
        sums.append(_weigh(g, c, a, b))
        squares.append(square_norms(g))
    return _add(sums), torch.cat(squares)


def _weigh(g: Tensor, c: Tensor | None, start: int, stop: int) -> Tensor:
    return g.sum(0) if c is None else torch.tensordot(c[start:stop].to(g.dtype), g, 1)


def _add(sums: list[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def widen(x: Any) -> Any:
    """Return a tensor of real numbers in at least float32, and anything else unchanged."""
    is_narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4
    return x.float() if is_narrow else x


def square_norms(gradients: Tensor) -> Tensor:
    """Compute the squared norm of each example of [B, ...], in at least float32."""
    wide: Tensor = widen(gradients)
    squares: Tensor
    if wide.ndim <= 2:
        squares = torch.linalg.vector_norm(wide.reshape(wide.shape[0], -1), dim=1).square()
    else:
        rows = wide.reshape(wide.shape[0], wide.shape[1], -1)
        squares = torch.linalg.vector_norm(rows, dim=2).square().sum(1)
    return squares


def dot_rows(x: Tensor, y: Tensor) -> Tensor:
    """Compute <x_i, y_i> of [B, ...] and [B, ...]; a complex number counts as two real ones."""
    if x.is_complex():
        x, y = (torch.view_as_real(t.resolve_conj()) for t in (x, y))
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if x.device.type == "cpu" and x.shape[1] >= _LONG_ROW:  # vecdot would store all the products
        return torch.stack([torch.dot(a, b) for a, b in zip(x, y, strict=True)])
    products: Tensor = torch.linalg.vecdot(x, y)
    return products
