"""Confirms, at a step, that the loss of each example reaches its own rows alone.

    all examples weighed alike          rows d_i
    example i weighed with r_i < 1      rows r_i d_i, if no row belongs to another example

Two examples differ in a digit of their number, and r_i = q^digit, one backward pass for each digit:
in 256 steps of q = 2^(-1/32), or in 8 steps of q = 1/2 where gradients are narrower than float32.
So a backward pass or two more show whether rows have changed places. A hook on an activation that
is not linear breaks the proportion too. What decides is the exact test: with chosen examples alone,
half of them for each bit of their number, the rows of all others must be 0.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["halves_by_bits", "rows_are_in_place"]

RowNorms = Callable[[Tensor], list[Tensor]]
"""|d_i| [B] of each watched operation, the examples weighed with r [B] in the backward pass."""


def rows_are_in_place(row_norms: RowNorms, num_examples: int, device: torch.device) -> bool:
    """Whether all rows grow in proportion to the weight of the example that they are taken for."""
    numbers = torch.arange(num_examples, device=device)
    plain = row_norms(torch.ones_like(numbers, dtype=torch.float64))
    is_narrow = any(norms.dtype.itemsize < 4 for norms in plain)
    base, q, slack = (8, 0.5, 0.2) if is_narrow else (256, 2 ** (-1 / 32), 0.005)
    while bool((numbers > 0).any()):
        weights = q ** (numbers % base).double()
        for before, after in zip(plain, row_norms(weights), strict=True):
            expected = before.double() * weights
            if bool(((after.double() - expected).abs() > slack * expected).any()):
                return False
        numbers = numbers // base
    return True


def halves_by_bits(num_examples: int, device: torch.device) -> Iterator[Tensor]:
    """Choices of examples [B]: those with a bit of their number set, and those without."""
    numbers = torch.arange(num_examples, device=device)
    for k in range((num_examples - 1).bit_length()):
        chosen = (numbers >> k) % 2 == 1
        yield chosen
        yield ~chosen
