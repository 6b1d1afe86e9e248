"""Interface of orders."""

from typing import Protocol, runtime_checkable

import torch

__all__ = ["OrderProtocol"]


@runtime_checkable
class OrderProtocol(Protocol):
    """Interface of an order; write your own for mixtures or curricula.

    Each method must be a pure function of its argument, since a run may resume at any step. If
    batches run on into the next epoch, or hold an example twice, the order also needs a method
    `visits(step)`, as `Order` has. Runs compare orders by their repr.
    """

    @property
    def seed(self) -> int:
        """Seed of the random numbers of the model and of augmentation, too."""

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of the examples of this step: int64 [B] on the CPU, B >= 1."""

    def num_steps(self, epochs: int) -> int:
        """Return the number of steps in this many epochs."""

    def epoch(self, step: int) -> int:
        """Return the epoch of the first example of this step, from 0."""

    def examples_before(self, step: int) -> int:
        """Return the number of examples used before this step."""
