"""Batches of a new permutation of the data each epoch.

    example(p) for positions p = 0, 1, 2, ...     one permutation of N examples an epoch
    batch of step t = example(t B) ... example(t B + B - 1)

B is the batch size. This is `last="carry"`; otherwise each epoch starts with a new batch.
See `permutation` for example(p).
"""

from dataclasses import dataclass, field
from typing import Literal, final, get_args

import torch

from anybatch.errors import OrderError
from anybatch.order.arguments import check_batch_size, check_integer, check_integers, check_step
from anybatch.order.permutation import get_examples
from anybatch.order.sampler import HasSampler

__all__ = ["LastBatch", "Order"]

LastBatch = Literal["keep", "carry", "drop"]
"""Use of the N mod B examples at an epoch's end: a short batch, the head of the next epoch's first
batch, or none."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Order(HasSampler):
    """A new permutation of the data each epoch, cut into batches.

    >>> import anybatch as ab
    >>> order = ab.Order(10, batch_size=4, seed=0)
    >>> [order.indices(step).tolist() for step in range(order.num_steps(epochs=1))]
    [[3, 4, 6, 9], [5, 7, 8, 2], [1, 0]]

    Args:
        num_examples: N, examples in the data set, 1 to 10^12.
        batch_size: B, examples of one step, over all ranks.
        seed: chooses the permutations, 0 to 2^64 - 1.
        last: use of the N mod B examples at an epoch's end: a short batch ("keep"), the head of
            the next epoch's first batch ("carry"), or none in that epoch ("drop").
        shuffle: False leaves the examples of each epoch in the order of the data.

    Raises:
        OrderError: an argument is out of range or not an integer, or B > N without "carry".
    """

    num_examples: int = field(kw_only=False)
    batch_size: int
    seed: int = 0
    last: LastBatch = "keep"
    shuffle: bool = True

    def __post_init__(self) -> None:
        check_integers(self)
        if self.last != "carry":
            check_batch_size(self.batch_size, self.num_examples, "Use last='carry', or")
        if self.last not in get_args(LastBatch):
            raise OrderError(
                f"last is {self.last!r}. It must be 'keep' (a short last batch), 'carry' (batches "
                f"go on into the next epoch) or 'drop' (the last N mod B examples are left out)."
            )
        if not isinstance(self.shuffle, bool):
            raise OrderError(
                f"shuffle is {self.shuffle!r}. It must be True (a new permutation each epoch) or "
                f"False (the order of the data). Pass a seed as seed=."
            )

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of the examples of this step.

        Args:
            step: any step >= 0, in any order of calls.

        Returns:
            int64 [B] on the CPU, which the caller may change; [N mod B] for a short last batch.

        Raises:
            OrderError: step is negative or not an integer.
        """
        epoch, first, count = self._locate(step)
        position = epoch * self.num_examples + first
        return torch.from_numpy(
            get_examples(self.num_examples, self.seed, position, count, shuffle=self.shuffle)
        )

    def num_steps(self, epochs: int) -> int:
        """Return the number of whole steps in this many epochs.

        keep: epochs ceil(N / B); drop: epochs floor(N / B); carry: floor(epochs N / B).

        Raises:
            OrderError: epochs is negative or not an integer.
        """
        epochs = check_integer("epochs", epochs, 0, "Whole epochs only.")
        if self.last == "carry":
            return epochs * self.num_examples // self.batch_size
        return epochs * self._steps_per_epoch

    def epoch(self, step: int) -> int:
        """Return the epoch of the first example of this step, from 0."""
        return self._locate(step)[0]

    def examples_before(self, step: int) -> int:
        """Return the number of examples used before this step; "drop" uses only whole batches."""
        if self.last == "keep":
            epoch, first, _ = self._locate(step)
            return epoch * self.num_examples + first
        return check_step(step) * self.batch_size

    def visits(self, step: int) -> list[int]:
        """Return the epoch of each example of this step: it tells the example's visits apart."""
        epoch, first, count = self._locate(step)
        return [epoch + place // self.num_examples for place in range(first, first + count)]

    @property
    def _steps_per_epoch(self) -> int:
        rest = self.batch_size - 1 if self.last == "keep" else 0  # of the last batch, at most
        return (self.num_examples + rest) // self.batch_size

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Return epoch and place there of the step's first example, and the number of examples."""
        if type(step) is not int or step < 0:
            step = check_step(step)
        if self.last == "carry":
            return *divmod(step * self.batch_size, self.num_examples), self.batch_size
        epoch, place = divmod(step, self._steps_per_epoch)
        first = place * self.batch_size
        return epoch, first, min(self.batch_size, self.num_examples - first)
