"""Learning rates as pure functions of the examples used so far.

    lr = schedule(examples),    examples = those of all updates before this one

Counted in examples, not steps, a schedule keeps its meaning at another batch size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from anybatch.errors import RecipeError

__all__ = ["Constant", "Schedule", "StepDecay", "WarmUp"]

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """The same learning rate throughout."""

    lr: float

    def __call__(self, examples: int) -> float:
        return self.lr


@dataclass(frozen=True, slots=True)
class StepDecay:
    """lr * factor^d, d the number of drops so far.

    Args:
        lr: learning rate at the start.
        factor: what each drop multiplies it by.
        every: examples from one drop to the next, or
        at: the numbers of examples at which it drops.
    """

    lr: float
    factor: float = 0.1
    every: int | None = None
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.every is None) == (not self.at):
            raise RecipeError("StepDecay expects either every=examples or at=(examples, ...).")
        if self.every is not None and self.every < 1:
            raise RecipeError(f"StepDecay expects every of at least 1 example, got {self.every}.")

    def __call__(self, examples: int) -> float:
        if self.every is not None:
            return float(self.lr * self.factor ** (examples // self.every))
        return float(self.lr * self.factor ** sum(examples >= drop for drop in self.at))


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Gradual warm-up: from start to the schedule's own rate, linearly over the first examples.

    Source: Goyal et al. 2017, 1706.02677, section 2.2.
    """

    schedule: Schedule
    examples: int
    start: float = 0.0

    def __call__(self, examples: int) -> float:
        lr = self.schedule(examples)
        if examples >= self.examples:
            return lr
        return self.start + (lr - self.start) * examples / self.examples
