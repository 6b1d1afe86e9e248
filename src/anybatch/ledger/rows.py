"""The examples of rows that a model has moved: routed to experts, packed, sorted, shuffled.

    owner(r) = i    where the gradient of row r comes from example i alone

The rows with a gradient when the examples whose number has bit k set go back alone have bit k in
their owner. So 2 log2(B) backward passes through the same graph tell the owner of every row,
whatever operations have moved it. A row without a gradient adds nothing and belongs to nobody; one
with gradients in both halves of a bit mixes examples.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Owners", "by_example", "halves"]

_NOBODY = -1


def halves(num_examples: int, device: torch.device) -> Iterator[Tensor]:
    """Masks [B] in pairs of complements; any two examples are apart in one of the pairs."""
    numbers = torch.arange(num_examples, device=device)
    for k in range((num_examples - 1).bit_length()):
        bit = (numbers >> k) % 2 == 1
        yield bit
        yield ~bit


def by_example(rows: Tensor, owners: Tensor, num_examples: int) -> Tensor:
    """Rows [N, ...] sorted by example [B, T, ...], in their order, zeros behind the last of each.

    Args:
        rows: in any order.
        owners: [N], -1 for rows that are to be left out.
        num_examples: B.
    """
    order = torch.argsort(owners, stable=True)
    order = order[owners[order] != _NOBODY]
    examples = owners[order]
    counts = torch.bincount(examples, minlength=num_examples)
    places = torch.arange(len(order), device=rows.device) - (counts.cumsum(0) - counts)[examples]
    found = rows.new_zeros(num_examples, max(1, int(counts.max())), *rows.shape[1:])
    found[examples, places] = rows[order]
    return found


@dataclass(slots=True)
class _Rows:
    """The rows of one use of an operation, and what the passes so far have shown of them."""

    owners: Tensor  # [N]
    is_reached: Tensor  # [N], by any example
    in_half: Tensor  # [N], by the last half


class Owners:
    """Notes which rows each half of the examples reaches; rows are known by their turn in a pass.

    Args:
        num_examples: B.
    """

    def __init__(self, num_examples: int) -> None:
        self._size = num_examples
        self._rows: list[_Rows] = []
        self._num_halves = self._turn = 0

    def begin(self) -> None:
        """Expect another pass, of the next half."""
        self._num_halves += 1
        self._turn = 0

    def note(self, rows: Tensor) -> bool:
        """Take in the gradient of rows [N, ...]; returns whether each has one example at most."""
        in_half = _is_reached(rows)
        bit, is_complement = divmod(self._num_halves - 1, 2)
        if self._num_halves == 1:
            self._rows.append(_Rows(torch.zeros_like(in_half, dtype=torch.long), in_half, in_half))
        own = self._rows[self._turn]
        self._turn += 1
        is_mixed = bool(is_complement) and bool((own.in_half & in_half).any())
        own.is_reached, own.in_half = own.is_reached | in_half, in_half
        if not is_complement:
            own.owners = own.owners | in_half.long() << bit
        return not is_mixed and bool((own.owners[own.is_reached] < self._size).all())

    def take(self, rows: Tensor) -> Tensor | None:
        """The owners [N] of the next rows of the last pass; None: they are others than before."""
        if not self._rows:
            return None
        own = self._rows.pop(0)
        reached = _is_reached(rows)
        if len(rows) != len(own.owners) or bool((reached & ~own.is_reached).any()):
            return None
        owners = own.owners.clamp(max=self._size - 1)  # beyond it after an overflow alone
        return torch.where(own.is_reached, owners, _NOBODY)


def _is_reached(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).any(1)
