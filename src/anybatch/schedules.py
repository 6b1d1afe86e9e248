"""Learning rates as pure functions of the examples used so far.

    lr = schedule(examples),    examples = those of all updates before this one

Counted in examples, not steps, a schedule keeps its meaning at another batch size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise

from torch.optim.lr_scheduler import LRScheduler

from anybatch.batch import is_count, is_number
from anybatch.errors import RecipeError

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Inverse",
    "Schedule",
    "StepDecay",
    "WarmUp",
    "check_schedule",
]

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """Constant learning rate.

    Example:
        >>> Constant(0.1)(examples=50_000)
        0.1
    """

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
        factor: each drop multiplies the learning rate by it.
        every: examples from one drop to the next, or
        at: the numbers of examples at which it drops, ascending.

    Raises:
        RecipeError: a value out of its range; both or neither of `every` and `at`.

    Example:
        >>> schedule = StepDecay(0.1, factor=0.5, every=1000)
        >>> schedule(0), schedule(1000), schedule(2500)
        (0.1, 0.05, 0.025)
    """

    lr: float
    factor: float = 0.1
    every: int | None = None
    at: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check_rate("StepDecay", "lr", self.lr)
        _check_factor("StepDecay", self.factor)
        if not isinstance(self.at, Sequence):
            raise RecipeError(f"StepDecay has at={self.at!r}. It must be numbers of examples.")
        if (self.every is None) == (not self.at):
            raise RecipeError("StepDecay needs either every=examples or at=(examples, ...).")
        if self.every is not None:
            _check_examples("StepDecay", "every", self.every)
        for drop in self.at:
            _check_examples("StepDecay", "an element of at", drop)
        if any(a >= b for a, b in pairwise(self.at)):
            raise RecipeError(f"StepDecay has at={self.at}. The numbers must be ascending.")

    def __call__(self, examples: int) -> float:
        if self.every is not None:
            return float(self.lr * self.factor ** (examples // self.every))
        return float(self.lr * self.factor ** sum(examples >= drop for drop in self.at))


@dataclass(frozen=True, slots=True)
class Inverse:
    """lr * (1 + gamma * t)^(-power), t = examples / every the iterations so far.

    Args:
        lr: learning rate at the start.
        gamma: speed of the decay, per iteration.
        power: exponent of the decay.
        every: examples of one iteration, that is the batch size that gamma belongs to.

    Raises:
        RecipeError: a value out of its range.

    Source: Caffe, `SGDSolver::GetLearningRate`, policy "inv".

    Example:
        >>> schedule = Inverse(0.1, gamma=1.0, power=0.5, every=100)
        >>> schedule(0), schedule(300)
        (0.1, 0.05)
    """

    lr: float
    gamma: float
    power: float
    every: int

    def __post_init__(self) -> None:
        for name in ("lr", "gamma", "power"):
            _check_rate("Inverse", name, getattr(self, name))
        _check_examples("Inverse", "every", self.every)

    def __call__(self, examples: int) -> float:
        return float(self.lr * (1 + self.gamma * examples / self.every) ** -self.power)


@dataclass(frozen=True, slots=True)
class Exponential:
    """lr * factor^t, t = examples / every; with staircase its integer part.

    Args:
        lr: learning rate at the start.
        factor: `every` examples multiply the learning rate by it.
        every: number of examples.
        staircase: True: it falls at once at the end of each `every` examples.

    Raises:
        RecipeError: a value out of its range.

    Source: TensorFlow, `tf.train.exponential_decay`.

    Example:
        >>> Exponential(0.1, factor=0.25, every=1000)(500)
        0.05
    """

    lr: float
    factor: float
    every: int
    staircase: bool = False

    def __post_init__(self) -> None:
        _check_rate("Exponential", "lr", self.lr)
        _check_factor("Exponential", self.factor)
        _check_examples("Exponential", "every", self.every)

    def __call__(self, examples: int) -> float:
        t = examples // self.every if self.staircase else examples / self.every
        return float(self.lr * self.factor**t)


@dataclass(frozen=True, slots=True)
class Cosine:
    """end + (lr - end) * (1 + cos(pi * t)) / 2, t = examples so far / all, at most 1.

    Args:
        lr: learning rate at the start.
        examples: number of examples after which it is `end`, and stays there.
        end: final learning rate.

    Raises:
        RecipeError: a value out of its range.

    Source: Loshchilov and Hutter 2017, 1608.03983, equation 5, without restarts.

    Example:
        >>> schedule = Cosine(0.2, examples=1000)
        >>> schedule(0), round(schedule(500), 4), schedule(2000)
        (0.2, 0.1, 0.0)
    """

    lr: float
    examples: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_rate("Cosine", "lr", self.lr)
        _check_rate("Cosine", "end", self.end)
        _check_examples("Cosine", "examples", self.examples)

    def __call__(self, examples: int) -> float:
        t = min(examples / self.examples, 1.0)
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * t)) / 2


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Gradual warm-up: from start to the schedule's own rate, linearly over the first examples.

    Args:
        schedule: the learning rate without warm-up, such as `Constant(0.1)`.
        examples: number of examples of the warm-up, at least 1.
        start: learning rate at the first update.

    Raises:
        RecipeError: a value out of its range.

    Source: Goyal et al. 2017, 1706.02677, section 2.2.

    Example:
        >>> schedule = WarmUp(Constant(0.5), examples=1000)
        >>> schedule(0), schedule(500), schedule(5000)
        (0.0, 0.25, 0.5)
    """

    schedule: Schedule
    examples: int
    start: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise RecipeError(
                f"WarmUp has schedule={self.schedule!r}. It must be one such as Constant(0.1)."
            )
        _check_examples("WarmUp", "examples", self.examples)
        _check_rate("WarmUp", "start", self.start)

    def __call__(self, examples: int) -> float:
        lr = self.schedule(examples)
        if examples >= self.examples:
            return lr
        return self.start + (lr - self.start) * examples / self.examples


def check_schedule(schedule: object) -> None:
    """Refuse an object that gives no learning rate.

    Raises:
        RecipeError: a number, a class, or a function of other arguments.
    """
    if schedule is None:
        return
    expected = (
        "A schedule is a function from the number of examples used so far to a learning rate, "
        "such as ab.StepDecay(lr, factor=0.1, every=examples)"
    )
    if isinstance(schedule, LRScheduler):  # see `steps`
        return
    if not callable(schedule) or isinstance(schedule, type):
        raise RecipeError(f"schedule is {schedule!r}. {expected}; ab.Constant(lr) is one, too.")
    try:
        signature(schedule).bind(0)
    except TypeError as error:
        raise RecipeError(
            f"schedule {schedule!r} has other arguments: {error}. {expected}."
        ) from error
    except ValueError:  # functions written in C have no signature to check
        return


def _check_rate(schedule: str, name: str, rate: float) -> None:
    if not (is_number(rate) and 0 <= rate < math.inf):
        raise RecipeError(f"{schedule} has {name}={rate!r}. It must be finite and at least 0.")


def _check_factor(schedule: str, factor: float) -> None:
    if not (is_number(factor) and 0 < factor < math.inf):
        raise RecipeError(f"{schedule} has factor={factor!r}. It must be finite and above 0.")


def _check_examples(schedule: str, name: str, examples: object) -> None:
    if not is_count(examples):
        raise RecipeError(
            f"{schedule}: {name} is {examples!r}. It must be a number of examples of at least 1."
        )
