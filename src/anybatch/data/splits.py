"""Keyed splits: the same examples for the same seed, on every machine.

A keyed permutation shuffles the n examples of each class (or all of them, if not stratified). The
first round(fraction * n) are held out, and those after them are for validation. Splits never
overlap, and data may be sorted by class.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.errors import DataError
from anybatch.order import Order, OrderProtocol
from anybatch.randomness import hash_integers

__all__ = ["OrderWithin", "Splits", "assign_splits", "split"]


class Splits(NamedTuple):
    """Sorted indices of the examples of each split; every example is in one of them."""

    train: Tensor
    validation: Tensor  # to choose by; may be empty
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

    >>> import torch
    >>> from anybatch.data import split
    >>> splits = split(torch.arange(10) % 2, held_out=0.2)
    >>> [len(ids) for ids in splits]  # train, validation, held out
    [8, 0, 2]

    Args:
        targets: [N], classes if stratified.
        held_out: fraction of the examples, of each class if stratified, above 0 and below 1.
        validation: fraction, likewise; 0: none. Held-out examples do not depend on it.
        seed: chooses the split.

    Raises:
        DataError: fractions that leave one of them empty.
    """
    if not 0 < held_out < 1 or not 0 <= validation < 1:
        raise DataError(
            f"The fractions are {held_out} held out and {validation} for validation. The first "
            f"must be between 0 and 1, the second at least 0 and below 1."
        )
    splits = assign_splits(targets, held_out, validation, seed=seed, stratify=stratify)
    num_train, num_validation, num_held_out = map(len, splits)
    if not (num_train and num_held_out and (num_validation or not validation)):
        sizes = f"{num_train} to train on and {num_held_out} held out"
        if validation:
            sizes += f", with {num_validation} for validation"
        raise DataError(
            f"Holding out {held_out} of {len(targets)} examples leaves {sizes}. None may be empty. "
            + ("Is a class too small? Split without stratify. " if stratify else "")
            + "Otherwise choose another fraction."
        )
    return splits


def assign_splits(
    targets: Tensor, held_out: float, validation: float, *, seed: int, stratify: bool
) -> Splits:
    """Split examples as `split` does, but allow empty splits."""
    groups = [torch.arange(len(targets))]
    if stratify:
        groups = [(targets == value).nonzero()[:, 0] for value in torch.unique(targets)]
    split_of = torch.zeros(len(targets), dtype=torch.int8)
    for number, members in enumerate(groups):
        size = len(members)
        shuffled = members[
            Order(size, batch_size=size, seed=hash_integers(seed, number)).indices(0)
        ]
        first, second = round(held_out * size), round(validation * size)
        split_of[shuffled[first : first + second]] = 1
        split_of[shuffled[:first]] = 2
    return Splits(*((split_of == number).nonzero()[:, 0] for number in range(3)))


@dataclass(frozen=True, slots=True)
class OrderWithin:
    """Order of the examples of one split, with their ids in the whole data set."""

    order: OrderProtocol  # of the places 0 .. len(ids) - 1
    ids: Tensor = field(repr=False)  # of the split

    @property
    def seed(self) -> int:
        """Seed of the order; this and the methods below are those of `OrderProtocol`."""
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
        """Return a number for each example that tells its visits apart; by default the epoch."""
        visits = getattr(self.order, "visits", None)
        return visits(step) if visits else [self.epoch(step)] * len(self.indices(step))
