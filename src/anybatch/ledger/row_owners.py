"""Owners of rows that a model has moved: routed to experts, packed, sorted, shuffled.

    owner(r) = i    if the gradient of row r comes from example i alone

There are two ways to find the owners. `Owners` takes halves of the examples backward: a row with a
gradient from the examples whose number has bit k set has bit k in its owner. So 2 log2(B) backward
passes through one graph find the owner of every row, whatever operations moved it. A row without a
gradient adds nothing and has no owner. A row with gradients from both halves of a bit mixes
examples.

`Scales` takes all examples backward, example i times a power of two:

    d_r(s) = s_i d_r    if row r belongs to example i alone,    s_i = 2^(k_i)

d_r(s) is the gradient of row r. Both d_r have the same digits, since a power of two only changes
the exponent; a row that mixes examples has others. With 16 powers one pass is enough for 16
examples, two for 256. A row that fails this test may still be right: gradients can be added up in
another order, or vanish in a narrow type. `Owners` then decides.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.ledger.contractions.placement import Placement

__all__ = ["DoubtError", "Owners", "Scales", "iterate_masks"]

_BASE = 16  # powers of two in one pass
_SLACK = 16  # units of rounding of the largest number of a row


def iterate_masks(num_examples: int, device: torch.device) -> Iterator[Tensor]:
    """Yield masks [B] in pairs of complements. Some pair separates any two examples."""
    numbers = torch.arange(num_examples, device=device)
    for k in range((num_examples - 1).bit_length()):
        bit = (numbers >> k) % 2 == 1
        yield bit
        yield ~bit


@dataclass(slots=True)
class _Rows:
    """Rows of one use of an operation, and the examples that reached them so far."""

    owners: Tensor  # [N]
    is_reached: Tensor  # [N], by any example
    in_mask: Tensor  # [N], by an example of the last mask


class Owners:
    """Finds owners from backward passes of masks; each pass visits the uses in the same order.

    Args:
        num_examples: B.
    """

    def __init__(self, num_examples: int) -> None:
        self._size = num_examples
        self._rows: list[_Rows] = []
        self._num_masks = self._num_uses = 0

    def begin_pass(self) -> None:
        """Begin the pass of the next mask."""
        self._num_masks += 1
        self._num_uses = 0

    def add_gradient(self, rows: Tensor) -> bool:
        """Add the gradient of rows [N, ...]; return whether each row has at most one example."""
        in_mask = _is_reached(rows)
        bit, is_complement = divmod(self._num_masks - 1, 2)
        if self._num_masks == 1:
            self._rows.append(_Rows(torch.zeros_like(in_mask, dtype=torch.long), in_mask, in_mask))
        use = self._rows[self._num_uses]
        self._num_uses += 1
        is_mixed = bool(is_complement) and bool((use.in_mask & in_mask).any())
        use.is_reached, use.in_mask = use.is_reached | in_mask, in_mask
        if not is_complement:
            use.owners = use.owners | in_mask.long() << bit
        return not is_mixed and bool((use.owners[use.is_reached] < self._size).all())

    def pop_owners(self, rows: Tensor) -> Tensor | None:
        """Return the owners [N] of the next rows of the last pass, -1 for none.

        None: these rows differ from those of the passes before.
        """
        if not self._rows:
            return None
        use = self._rows.pop(0)
        if len(rows) != len(use.owners) or bool((_is_reached(rows) & ~use.is_reached).any()):
            return None
        owners = use.owners.clamp(max=self._size - 1)  # larger only after an overflow
        return torch.where(use.is_reached, owners, -1)


def _is_reached(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).any(1)


class DoubtError(Exception):
    """A row may belong to another example, or to several."""


class Scales:
    """Finds owners from backward passes in which examples are multiplied by powers of two.

    Args:
        num_examples: B.
        device: of the losses.
    """

    def __init__(self, num_examples: int, device: torch.device) -> None:
        self._size = num_examples
        numbers = torch.arange(num_examples, device=device)
        digits: list[Tensor] = []
        while not digits or _BASE ** len(digits) < num_examples:
            digits.append(numbers // _BASE ** len(digits) % _BASE)
        self._digits = torch.stack(digits)  # [passes, B], of the number of each example
        self._passes: list[list[Tensor]] = []
        self._num_uses = 0

    def iterate_factors(self) -> Iterator[Tensor]:
        """Yield the factors [B] of each backward pass."""
        for digits in self._digits:
            self._passes.append([])
            yield _power(digits)

    def add_gradient(self, d: Tensor) -> None:
        """Add the gradient of the next use in the pass."""
        self._passes[-1].append(d.detach().clone())

    def find_owners(self, placement: Placement, d: Tensor) -> Placement:
        """Return the placement of the next use in the last pass, with the owners of its rows.

        Raises:
            DoubtError: a row may belong to another example.
        """
        is_same = all(self._num_uses < len(gradients) for gradients in self._passes)
        if d.dtype == torch.float16 or not is_same:
            raise DoubtError("The gradients differ from earlier passes, or float16 is too narrow.")
        scaled = [gradients[self._num_uses] for gradients in self._passes]
        self._num_uses += 1
        if placement.kind == "rows":
            rows, *others = [_flatten(placement.flatten_rows(x)) for x in (d, *scaled)]
            return placement.with_owners(self._owners(rows, others))
        rows, *others = (_flatten(placement.move_first(x, self._size)) for x in (d, *scaled))
        for other, digits in zip(others, self._digits, strict=True):
            _check_rows(rows, other, digits)
        return placement

    def _owners(self, rows: Tensor, scaled: list[Tensor]) -> Tensor:
        """Compute the owner of each row, [N], -1 for rows without a gradient."""
        if not rows.numel():
            return rows.new_zeros(len(rows), dtype=torch.long)
        largest = rows.abs().argmax(1, keepdim=True)
        size = rows.gather(1, largest)[:, 0]
        owners = torch.zeros_like(largest[:, 0])
        for k, other in enumerate(scaled):
            ratio = other.gather(1, largest)[:, 0] / size
            digits = torch.where(size == 0, 0, ratio.log2().round() + _BASE // 2)
            if not bool(((digits >= 0) & (digits < _BASE)).all()):
                raise DoubtError("Rows may be mixed: their factor is no power of two.")
            _check_rows(rows, other, digits.long())
            owners += digits.long() * _BASE**k
        if not bool((owners < self._size).all()):
            raise DoubtError("Rows may be mixed: no example has their factor.")
        return torch.where(size == 0, -1, owners)


def _check_rows(rows: Tensor, scaled: Tensor, digits: Tensor) -> None:
    """Check that rows [N, k] were multiplied by the powers of their digits [N]."""
    factors = _power(digits).to(rows.dtype)[:, None]
    if not rows.numel():
        return
    eps = torch.finfo(rows.dtype).eps if rows.dtype.itemsize >= 4 else 0.0  # narrow: exact
    slack = _SLACK * eps * rows.abs().amax(1, keepdim=True)
    if not bool(((scaled / factors - rows).abs() <= slack).all()):
        raise DoubtError("Rows may be mixed: parts of them have other powers of two.")


def _power(digits: Tensor) -> Tensor:
    return torch.pow(2.0, digits - _BASE // 2)


def _flatten(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), max(1, tensor[:1].numel()))
