"""Keyed splits: the same examples for the same seed, on every machine.

Within each class (or the whole, where not stratified) a keyed permutation puts the examples in
an order; the first round(fraction * n) are held out. Splits never overlap, and a file that is
sorted by class is no trap.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.errors import DataError
from anybatch.order import Order
from anybatch.randomness import fold

__all__ = ["OrderWithin", "Splits", "split"]


class Splits(NamedTuple):
    """Indices of the examples of each part, sorted."""

    train: Tensor
    held_out: Tensor


def split(targets: Tensor, held_out: float, *, seed: int = 0, stratify: bool = True) -> Splits:
    """Split examples into those to train on and those held out.

    Args:
        targets: [N], classes where stratified.
        held_out: fraction of the examples, of each class where stratified, above 0 and below 1.
        seed: which split.

    Raises:
        DataError: a fraction that leaves one of them empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"expected a held-out fraction between 0 and 1, got {held_out}.")
    num_examples = len(targets)
    groups = [torch.arange(num_examples)]
    if stratify:
        groups = [(targets == value).nonzero()[:, 0] for value in torch.unique(targets)]
    chosen = torch.zeros(num_examples, dtype=torch.bool)
    for number, members in enumerate(groups):
        size = len(members)
        shuffled = Order(size, batch_size=size, seed=fold(seed, number)).indices(0)
        chosen[members[shuffled[: round(held_out * size)]]] = True
    parts = Splits((~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0])
    if not len(parts.train) or not len(parts.held_out):
        raise DataError(
            f"holding out {held_out} of {num_examples} examples leaves {len(parts.train)} to train "
            f"on and {len(parts.held_out)} held out, expected some of both. "
            + ("Is a class too small? Split without stratify. " if stratify else "")
            + "Otherwise choose another fraction."
        )
    return parts


@dataclass(frozen=True, slots=True)
class OrderWithin:
    """An order of the examples of one part, whose ids stay those of the whole data set."""

    order: Order  # of the places 0 .. len(ids) - 1
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
