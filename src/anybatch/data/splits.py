"""Keyed splits: the same examples for the same seed, on every machine.

Within each class (or the whole, where not stratified) a keyed permutation puts the examples in
an order; the first round(fraction * n) are held out, and those after them are for validation.
Splits never overlap, and a file that is sorted by class is no trap.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.errors import DataError
from anybatch.order import Order, OrderProtocol
from anybatch.randomness import hash_integers

__all__ = ["OrderWithin", "Splits", "cut", "split"]


class Splits(NamedTuple):
    """Indices of the examples of each part, sorted; every example is in one of them."""

    train: Tensor
    validation: Tensor  # to choose by; empty where none was asked for
    held_out: Tensor  # to judge by


def split(
    targets: Tensor,
    held_out: float,
    *,
    validation: float = 0.0,
    seed: int = 0,
    stratify: bool = True,
) -> Splits:
    """Split examples into those to train on, to choose by and to judge by.

    Args:
        targets: [N], classes where stratified.
        held_out: fraction of the examples, of each class where stratified, above 0 and below 1.
        validation: fraction, likewise; 0: none. What is held out does not depend on it.
        seed: which split.

    Raises:
        DataError: fractions that leave one of them empty.
    """
    if not 0 < held_out < 1 or not 0 <= validation < 1:
        raise DataError(
            f"expected a held-out fraction between 0 and 1, and one for validation of at least 0 "
            f"and below 1, got {held_out} and {validation}."
        )
    parts = cut(targets, held_out, validation, seed=seed, stratify=stratify)
    if not (len(parts.train) and len(parts.held_out) and (len(parts.validation) or not validation)):
        sizes = f"{len(parts.train)} to train on and {len(parts.held_out)} held out"
        if validation:
            sizes += f", with {len(parts.validation)} for validation"
        raise DataError(
            f"holding out {held_out} of {len(targets)} examples leaves {sizes}, "
            f"expected some of both. "
            + ("Is a class too small? Split without stratify. " if stratify else "")
            + "Otherwise choose another fraction."
        )
    return parts


def cut(
    targets: Tensor, held_out: float, validation: float, *, seed: int, stratify: bool
) -> Splits:
    """The same as `split`, where parts may be empty."""
    groups = [torch.arange(len(targets))]
    if stratify:
        groups = [(targets == value).nonzero()[:, 0] for value in torch.unique(targets)]
    part = torch.zeros(len(targets), dtype=torch.int8)
    for number, members in enumerate(groups):
        size = len(members)
        shuffled = members[
            Order(size, batch_size=size, seed=hash_integers(seed, number)).indices(0)
        ]
        first, second = round(held_out * size), round(validation * size)
        part[shuffled[first : first + second]] = 1
        part[shuffled[:first]] = 2
    return Splits(*((part == which).nonzero()[:, 0] for which in range(3)))


@dataclass(frozen=True, slots=True)
class OrderWithin:
    """An order of the examples of one part, whose ids stay those of the whole data set."""

    order: OrderProtocol  # of the places 0 .. len(ids) - 1
    ids: Tensor = field(repr=False)  # of the part

    @property
    def seed(self) -> int:
        """See `OrderProtocol`, as for all below."""
        return self.order.seed

    def indices(self, step: int) -> Tensor:
        return self.ids[self.order.indices(step)]

    def num_steps(self, epochs: int) -> int:
        return self.order.num_steps(epochs)

    def epoch(self, step: int) -> int:
        return self.order.epoch(step)

    def examples_before(self, step: int) -> int:
        return self.order.examples_before(step)

    def visits(self, step: int) -> list[int]:
        """What tells the visits of one example apart; its epoch where the order says no more."""
        visits = getattr(self.order, "visits", None)
        return visits(step) if visits else [self.epoch(step)] * len(self.indices(step))
