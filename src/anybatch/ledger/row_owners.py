"""The examples of rows that a model has moved: routed to experts, packed, sorted, shuffled.

    owner(r) = i    where the gradient of row r comes from example i alone

The rows with a gradient when the examples whose number has bit k set go back alone have bit k in
their owner. So 2 log2(B) backward passes through the same graph tell the owner of every row,
whatever operations have moved it. A row without a gradient adds nothing and belongs to nobody; one
with gradients in both halves of a bit mixes examples.

The examples of rows, told by powers of two: a short way to what `rows` finds out.

    d_r(s) = s_i d_r    where row r belongs to example i alone,    s_i = 2^(k_i)

d_r(s) is the gradient of row r when each v_i goes back times s_i, d_r the one with all s_i = 1.
Both have the same digits, since a power of two changes the exponent alone; a row that mixes
examples has others. With 16 powers one backward pass is enough for 16 examples, two are for 256.

What is not found to be so is not known to be wrong: gradients may have been added up in another
order, or vanish in a narrow type. `rows` then decides.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.ledger.contractions.placement import Placement

__all__ = ["DoubtError", "Owners", "Scales", "halves"]


def halves(num_examples: int, device: torch.device) -> Iterator[Tensor]:
    """Masks [B] in pairs of complements; any two examples are apart in one of the pairs."""
    numbers = torch.arange(num_examples, device=device)
    for k in range((num_examples - 1).bit_length()):
        bit = (numbers >> k) % 2 == 1
        yield bit
        yield ~bit


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
        return torch.where(own.is_reached, owners, -1)


def _is_reached(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).any(1)


_BASE = 16
_SLACK = 16  # units of rounding of the largest number of a row
_NARROW = torch.float16  # its exponents have no room


class DoubtError(Exception):
    """A row of which it is not clear whose it is."""


class Scales:
    """Gradients of all uses when examples go back times powers of two.

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
        self._turn = 0

    def passes(self) -> Iterator[Tensor]:
        """The factors [B] of each backward pass."""
        for digits in self._digits:
            self._passes.append([])
            yield _power(digits)

    def note(self, d: Tensor) -> None:
        """Take in the gradient of the next use in the pass."""
        self._passes[-1].append(d.detach().clone())

    def place(self, placement: Placement, d: Tensor) -> Placement:
        """The placement of the next use in the last pass, with the owners of its rows.

        Raises:
            DoubtError: rows that may be those of other examples.
        """
        if d.dtype == _NARROW or any(self._turn >= len(own) for own in self._passes):
            raise DoubtError("the gradients of this pass are others, or of a type without room.")
        scaled = [own[self._turn] for own in self._passes]
        self._turn += 1
        if placement.kind == "rows":
            own = [_flat(placement.rows(x)) for x in (d, *scaled)]
            return placement.owned(self._owners(own[0], own[1:]))
        first, *others = (_flat(placement.first(x, self._size)) for x in (d, *scaled))
        for other, digits in zip(others, self._digits, strict=True):
            _check(first, other, digits)
        return placement

    def _owners(self, rows: Tensor, scaled: list[Tensor]) -> Tensor:
        """[N], the example of each row, -1 for rows without a gradient."""
        if not rows.numel():
            return rows.new_zeros(len(rows), dtype=torch.long)
        largest = rows.abs().argmax(1, keepdim=True)
        size = rows.gather(1, largest)[:, 0]
        owners = torch.zeros_like(largest[:, 0])
        for k, other in enumerate(scaled):
            ratio = other.gather(1, largest)[:, 0] / size
            digits = torch.where(size == 0, 0, ratio.log2().round() + _BASE // 2)
            if not bool(((digits >= 0) & (digits < _BASE)).all()):
                raise DoubtError("rows may be mixed: they have not grown by a power of two.")
            _check(rows, other, digits.long())
            owners += digits.long() * _BASE**k
        if not bool((owners < self._size).all()):
            raise DoubtError("rows may be mixed: no example has grown so.")
        return torch.where(size == 0, -1, owners)


def _check(rows: Tensor, scaled: Tensor, digits: Tensor) -> None:
    """See that rows [N, k] have grown by the powers of their digits [N]."""
    factors = _power(digits).to(rows.dtype)[:, None]
    if not rows.numel():
        return
    eps = torch.finfo(rows.dtype).eps if rows.dtype.itemsize >= 4 else 0.0  # a narrow one is coarse
    slack = _SLACK * eps * rows.abs().amax(1, keepdim=True)
    if not bool(((scaled / factors - rows).abs() <= slack).all()):
        raise DoubtError("rows may be mixed: parts of them have grown by other powers of two.")


def _power(digits: Tensor) -> Tensor:
    return torch.pow(2.0, digits - _BASE // 2)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), max(1, tensor[:1].numel()))
