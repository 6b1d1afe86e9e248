"""What is known of one place where the batch meets a parameter.

    gradient of the parameter = sum_i c_i g_i,    g_i that of sum_t v_it of example i alone

A rule gives the g_i; sums, squares and inner products follow from them a few examples at a time,
unless the rule knows a shorter way.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from anybatch._torch import tree_map

__all__ = ["Contraction", "dots", "pieces", "square", "total_and_squares"]

_ELEMENTS = 2**22  # of the gradients of some examples that are held at once
_LONG = 2**14  # elements of a row from which one product at a time is quicker


class Contraction(ABC):
    """One use of a parameter by B examples, once a backward pass has reached it."""

    @abstractmethod
    def __len__(self) -> int:
        """B."""

    @abstractmethod
    def take(self, start: int, stop: int) -> Self:
        """The same of the examples start .. stop-1 alone."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """g_i: [B, ...], shaped like the parameter."""

    def total(self, c: Tensor | None) -> Tensor:
        """sum_i c_i g_i, shaped like the parameter; None: all c_i = 1."""
        sums = [
            g.sum(0) if c is None else torch.tensordot(c[a:b].to(g.dtype), g, 1)
            for a, b, g in pieces([self])
        ]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """`total(c)` and `squares()`, each g_i made once."""
        return total_and_squares([self], c)

    @property
    def is_outer(self) -> bool:
        """Whether sums and squares are shorter than what is made of whole gradients."""
        return False

    def kept(self) -> "Contraction":
        """The same, as it is to be kept for a second look: whichever is smaller."""
        return self

    def squares(self) -> Tensor:
        """|g_i|^2: [B], in at least float32."""
        return torch.cat([square(g) for _, _, g in pieces([self])])

    def wide(self) -> Self:
        """The same in at least float32."""
        own = {f.name: tree_map(_wide, getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **own)  # type: ignore[type-var]

    def inner(self, direction: Tensor) -> Tensor:
        """<g_i, direction>: [B]; of complex ones, as of twice as many real ones."""
        return torch.cat([dots(g, direction.expand_as(g)) for _, _, g in pieces([self])])


def pieces(uses: list["Contraction"]) -> Iterator[tuple[int, int, Tensor]]:
    """Sums of the gradients of several uses, a few examples at a time: (start, stop, [b, ...])."""
    size = len(uses[0])
    start, count = 0, 1
    while start < size:
        stop = min(start + count, size)
        found = uses[0].take(start, stop).gradients()
        for use in uses[1:]:
            found = found + use.take(start, stop).gradients()
        yield start, stop, found
        start, count = stop, max(1, _ELEMENTS * len(found) // max(1, found.numel()))


def _wide(x: Any) -> Any:
    is_narrow = isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4
    return x.float() if is_narrow else x


def total_and_squares(uses: list[Contraction], c: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_i c_i g_i and |g_i|^2 of the sum of several uses."""
    sums, squares = [], []
    for a, b, g in pieces(uses):
        sums.append(g.sum(0) if c is None else torch.tensordot(c[a:b].to(g.dtype), g, 1))
        squares.append(square(g))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0), torch.cat(squares)


def square(gradients: Tensor) -> Tensor:
    """[B, ...] to [B], summed in at least float32, and no more than a row of each at a time."""
    wide: Tensor = _wide(gradients)
    found: Tensor
    if wide.ndim <= 2:
        found = torch.linalg.vector_norm(wide.reshape(wide.shape[0], -1), dim=1).square()
    else:
        rows = wide.reshape(wide.shape[0], wide.shape[1], -1)
        found = torch.linalg.vector_norm(rows, dim=2).square().sum(1)
    return found


def dots(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> of [B, ...] and [B, ...]: [B]; of complex ones, as of twice as many real ones."""
    if x.is_complex():
        x, y = (torch.view_as_real(t.resolve_conj()) for t in (x, y))
    rows, others = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if rows.device.type == "cpu" and rows.shape[1] >= _LONG:  # vecdot writes all products down
        return torch.stack([torch.dot(a, b) for a, b in zip(rows, others, strict=True)])
    found: Tensor = torch.linalg.vecdot(rows, others)
    return found
