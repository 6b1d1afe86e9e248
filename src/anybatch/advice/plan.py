"""A batch-size plan: steps, examples, time and cost to the loss that a recipe's own run reaches.

    seconds(B) = S(B) * seconds of an update of B examples,    cost = hours(B) * price per hour

S(B) is the hyperbola through the recipe's own S0 steps at B0 (see `hyperbola`), the noise scale of
each stretch of the run being that of the nearest point where it was measured. What is predicted is
a range: from the least noise that the measurements allow to the most, and from Bcrit = B_simple / 8
to B_simple / 0.05, which is what the source has found between them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from anybatch.advice.hyperbola import SIMPLE_OVER_CRITICAL, Tradeoff, fit_hyperbola
from anybatch.advice.measure import Point
from anybatch.advice.speed import Speed, choose_micro_batch, predict_seconds

__all__ = ["Plan", "Range", "Row", "split_stretches"]

LARGEST = 2**20  # examples of the largest power of two that is looked at
NEAR = 1.25  # times the least seconds: about as fast as the fastest


@dataclass(frozen=True, slots=True)
class Range:
    """A prediction, and between what it may lie."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        """In another unit."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch size."""

    batch: int
    steps: Range
    examples: Range
    seconds: Range
    cost: Range | None  # None: no price is known
    micro_batch: int  # the fastest that was measured
    peak_bytes: int  # at that micro-batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and what follows.

    Args:
        points: the noise scale along the run, one at least.
        speeds: of micro-batches of 1, 2, 4, ... examples.
        optimizer_seconds: of each update, whatever its size.
        steps: S0, of the recipe's own run.
        batch: B0, examples of its updates.
        num_examples: D, of the data set.
        price_per_hour: of this machine, in any currency.
    """

    points: Sequence[Point]
    speeds: Sequence[Speed]
    optimizer_seconds: float
    steps: int
    batch: int
    num_examples: int
    price_per_hour: float | None = None

    @cached_property
    def tradeoffs(self) -> tuple[Tradeoff, Tradeoff, Tradeoff]:
        """The likeliest hyperbola, and those of the least and the most noise."""
        least, most = SIMPLE_OVER_CRITICAL

        def of(noise: Callable[[Point], float]) -> Tradeoff:
            return fit_hyperbola(split_stretches(self.points, self.steps, noise), self.batch)

        return of(lambda p: p.noise), of(lambda p: p.low / most), of(lambda p: p.high / least)

    @property
    def critical(self) -> Range:
        """Bcrit, at which steps and examples are both twice their least."""
        return self._range(lambda tradeoff: tradeoff.critical)

    @property
    def batches(self) -> list[int]:
        """Powers of two, as far as there are so many examples, and the full data set."""
        powers = [2**k for k in range(LARGEST.bit_length())]
        return [*(power for power in powers if power < self.num_examples), self.num_examples]

    def row(self, batch: int) -> Row:
        """What is predicted for a batch size."""
        best, price = choose_micro_batch(self.speeds, batch), self.price_per_hour
        seconds = self._range(lambda tradeoff: self._seconds(tradeoff, batch))
        return Row(
            batch=batch,
            steps=self._range(lambda tradeoff: tradeoff.steps(batch)),
            examples=self._range(lambda tradeoff: tradeoff.examples(batch)),
            seconds=seconds,
            cost=None if price is None else seconds.times(price / 3600),
            micro_batch=best.micro_batch,
            peak_bytes=best.peak_bytes,
        )

    @cached_property
    def advised(self) -> tuple[int, int]:
        """Smallest and largest of the batches around the fastest that are about as fast, on this
        machine: never one alone, since neither noise nor speed is known so well."""
        return self._fast(self.tradeoffs[0])

    @property
    def advised_at_most(self) -> tuple[int, int]:
        """The same, as far as the range of the noise scale allows."""
        low, high = zip(*map(self._fast, self.tradeoffs), strict=True)
        return min(low), max(high)

    def _fast(self, tradeoff: Tradeoff) -> tuple[int, int]:
        batches = self.batches
        taken = [self._seconds(tradeoff, batch) for batch in batches]
        first = last = taken.index(min(taken))
        while first > 0 and taken[first - 1] <= NEAR * min(taken):
            first -= 1
        while last + 1 < len(taken) and taken[last + 1] <= NEAR * min(taken):
            last += 1
        if first == last:
            first, last = max(first - 1, 0), min(last + 1, len(batches) - 1)
        return batches[first], batches[last]

    def _seconds(self, tradeoff: Tradeoff, batch: int) -> float:
        return tradeoff.steps(batch) * predict_seconds(self.speeds, self.optimizer_seconds, batch)

    def _range(self, figure: Callable[[Tradeoff], float]) -> Range:
        value, *others = map(figure, self.tradeoffs)
        return Range(value, min(value, *others), max(value, *others))


def split_stretches(
    points: Sequence[Point], steps: int, noise: Callable[[Point], float]
) -> list[tuple[float, float]]:
    """Of each point the steps that are nearer to it than to another, and its noise."""
    edges = [0.0, *((a.step + b.step) / 2 for a, b in pairwise(points)), float(steps)]
    return [(b - a, noise(point)) for (a, b), point in zip(pairwise(edges), points, strict=True)]
