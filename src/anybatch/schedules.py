"""Learning rates as pure functions of the examples used so far.

    lr = schedule(examples),    examples = those of all updates before this one

Counted in examples, not steps, a schedule keeps its meaning at another batch size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from anybatch.batch import is_count
from anybatch.errors import RecipeError

__all__ = ["Constant", "Schedule", "StepDecay", "WarmUp"]

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """The same learning rate throughout."""

    lr: float

    def __post_init__(self) -> None:
        _check_rate("Constant", "lr", self.lr)

    def __call__(self, examples: int) -> float:
        return self.lr


@dataclass(frozen=True, slots=True)
class StepDecay:
    """lr * factor^d, d the number of drops so far.

    Args:
        lr: learning rate at the start.
        factor: what each drop multiplies it by.
        every: examples from one drop to the next, or
        at: the numbers of examples at which it drops, ascending.

    Raises:
        RecipeError: a value out of its range; both or neither of `every` and `at`.
    """

    lr: float
    factor: float = 0.1
    every: int | None = None
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_rate("StepDecay", "lr", self.lr)
        if not 0 < self.factor < math.inf:
            raise RecipeError(f"StepDecay expects a finite factor above 0, got {self.factor}.")
        if (self.every is None) == (not self.at):
            raise RecipeError("StepDecay expects either every=examples or at=(examples, ...).")
        if self.every is not None:
            _check_examples("StepDecay", "every", self.every)
        for drop in self.at:
            _check_examples("StepDecay", "each of at", drop)
        if any(a >= b for a, b in pairwise(self.at)):
            raise RecipeError(f"StepDecay expects at in ascending order, got {self.at}.")

    def __call__(self, examples: int) -> float:
        if self.every is not None:
            return float(self.lr * self.factor ** (examples // self.every))
        return float(self.lr * self.factor ** sum(examples >= drop for drop in self.at))


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Gradual warm-up: from start to the schedule's own rate, linearly over the first examples.

    Args:
        schedule: the learning rate without warm-up, such as `Constant(0.1)`.
        examples: over how many it warms up, at least 1.
        start: learning rate at the first update.

    Raises:
        RecipeError: a value out of its range.

    Source: Goyal et al. 2017, 1706.02677, section 2.2.
    """

    schedule: Schedule
    examples: int
    start: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise RecipeError(
                f"WarmUp expects a schedule such as Constant(0.1), got {self.schedule!r}."
            )
        _check_examples("WarmUp", "examples", self.examples)
        _check_rate("WarmUp", "start", self.start)

    def __call__(self, examples: int) -> float:
        lr = self.schedule(examples)
        if examples >= self.examples:
            return lr
        return self.start + (lr - self.start) * examples / self.examples


def _check_rate(schedule: str, name: str, rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise RecipeError(f"{schedule} expects a finite {name} of at least 0, got {rate}.")


def _check_examples(schedule: str, name: str, examples: object) -> None:
    if not is_count(examples):
        raise RecipeError(
            f"{schedule} expects {name} to be a number of examples of at least 1, got {examples!r}."
        )
