"""Confirms, at a step, that the loss of each example reaches its own rows alone.

    all examples weighed alike          rows d_i
    example i weighed with r_i < 1      rows r_i d_i, if no row belongs to another example

Two examples differ in a digit of their number, and r_i = q^digit, one backward pass for each digit:
in 256 steps of q = 2^(-1/32), or in 8 steps of q = 1/2 where gradients are narrower than float32.
So a backward pass or two more show whether rows have changed places. A hook on an activation that
is not linear breaks the proportion too. What decides is the exact test: with chosen examples alone,
half of them for each bit of their number, the rows of all others must be 0.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradients_kept", "rows_are_in_place"]

RowNorms = Callable[[Tensor], list[Tensor]]
"""|d_i| [B] of each watched operation, the examples weighed with r [B] in the backward pass."""


def rows_are_in_place(row_norms: RowNorms, num_examples: int, device: torch.device) -> bool:
    """Whether all rows grow in proportion to the weight of the example that they are taken for."""
    numbers = torch.arange(num_examples, device=device)
    plain = row_norms(torch.ones_like(numbers, dtype=torch.float32))
    is_narrow = any(norms.dtype.itemsize < 4 for norms in plain)
    base, q, slack = (8, 0.5, 0.2) if is_narrow else (256, 2 ** (-1 / 32), 0.005)
    while bool((numbers > 0).any()):
        weights = q ** (numbers % base).float()
        for before, after in zip(plain, row_norms(weights), strict=True):
            expected = before.float() * weights
            is_near = (after.float() - expected).abs() <= slack * expected  # false of nan
            if not bool(is_near.all()):
                return False
        numbers = numbers // base
    return True


@contextmanager
def gradients_kept(values: Iterable[Tensor], *, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Leave `.grad` of all leaves of a graph as it was, but for some, whatever passes add to it.

    These are inputs that somebody wants the gradient of, and parameters outside of the model.
    """
    spared = {id(x) for x in but}
    leaves = [x for x in _leaves(values) if id(x) not in spared]
    before = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    try:
        yield
    finally:
        for x, gradient in zip(leaves, before, strict=True):
            x.grad = gradient


def _leaves(values: Iterable[Tensor]) -> Iterator[Tensor]:
    todo: list[Any] = [v.grad_fn for v in values if v.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):  # of a node that adds to `.grad`
            yield node.variable
        following = {inner for inner, _ in node.next_functions if inner is not None} - seen
        seen |= following
        todo += following
