"""Plan of a batch size: steps, examples, time and cost to the loss that a recipe's own run reaches.

    seconds(B) = S(B) * seconds of an update of B examples,    cost = hours(B) * price per hour

S(B) is the hyperbola through the recipe's own S0 steps at B0 (see `hyperbola`). Each stretch of the
run has the noise scale of the nearest point where it was measured. A prediction has a range: from
the least noise that the measurements allow to the most, and from Bcrit = B_simple / 8 to B_simple /
0.05, which is what the source of `hyperbola` has found between them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from anybatch.advice import measure, speed
from anybatch.advice.hyperbola import SIMPLE_OVER_CRITICAL, Tradeoff, fit_hyperbola
from anybatch.advice.measure import Point
from anybatch.advice.speed import Speed, choose_micro_batch, predict_seconds
from anybatch.errors import RecipeError
from anybatch.recipe.build import Setup, build
from anybatch.recipe.code import permit_code
from anybatch.recipe.runs import change_run_recipe, compare_data, find_newest, load_recipe
from anybatch.runs.run import is_run

__all__ = ["Plan", "Range", "Row", "measure_plan", "split_stretches"]

T = TypeVar("T", Point, Speed)

MAX_BATCH = 2**20  # examples of the largest power of two in a plan
NEAR = 1.25  # times the least seconds: about as fast as the fastest


@dataclass(frozen=True, slots=True)
class Range:
    """Prediction, and its lowest and highest value."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        """Multiply by a factor."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Predictions for one batch size."""

    batch: int
    steps: Range
    examples: Range
    seconds: Range
    cost: Range | None  # None: no price is known
    micro_batch: int  # the fastest that was measured
    peak_bytes: int  # at that micro-batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Measurements of a recipe, and predictions from them.

    Args:
        points: noise scale along the run, at least one.
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
        """Likeliest hyperbola, and those of the least and the most noise."""
        least, most = SIMPLE_OVER_CRITICAL

        def fit(noise: Callable[[Point], float]) -> Tradeoff:
            return fit_hyperbola(split_stretches(self.points, self.steps, noise), self.batch)

        return fit(lambda p: p.noise), fit(lambda p: p.low / most), fit(lambda p: p.high / least)

    @property
    def critical(self) -> Range:
        """Bcrit, at which steps and examples are both twice their least."""
        return self._range(lambda tradeoff: tradeoff.critical)

    @property
    def batches(self) -> list[int]:
        """Powers of two below the number of examples, and the full data set."""
        powers = [2**k for k in range(MAX_BATCH.bit_length())]
        return [*(power for power in powers if power < self.num_examples), self.num_examples]

    @cached_property
    def rows(self) -> list[Row]:
        """Predictions for each of the batch sizes."""
        return [self.predict(batch) for batch in self.batches]

    def predict(self, batch: int) -> Row:
        """Predict all figures for a batch size."""
        best, price = choose_micro_batch(self.speeds, batch), self.price_per_hour
        seconds = self._range(lambda tradeoff: self._predict_seconds(tradeoff, batch))
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
    def recommendation(self) -> tuple[int, int]:
        """Smallest and largest batch size around the fastest that are about as fast here.

        They are never one alone, since neither noise nor speed is known so well.
        """
        return self._find_fast(self.tradeoffs[0])

    @property
    def widest_recommendation(self) -> tuple[int, int]:
        """Smallest and largest recommendation within the range of the noise scale."""
        low, high = zip(*map(self._find_fast, self.tradeoffs), strict=True)
        return min(low), max(high)

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        smallest, largest = self.recommendation
        low, high = self.widest_recommendation
        return {
            "advised": {"from": smallest, "to": largest, "at_least": low, "at_most": high},
            "steps": self.steps,
            "batch": self.batch,
            "num_examples": self.num_examples,
            "noise_scale": [asdict(point) for point in self.points],
            "critical_batch": asdict(self.critical),
            "speeds": [asdict(speed) for speed in self.speeds],
            "optimizer_seconds": self.optimizer_seconds,
            "rows": [asdict(row) for row in self.rows],
        }

    def _find_fast(self, tradeoff: Tradeoff) -> tuple[int, int]:
        """Find the smallest and largest batch size around the fastest that are about as fast."""
        batches = self.batches
        seconds = [self._predict_seconds(tradeoff, batch) for batch in batches]
        limit = NEAR * min(seconds)
        first = last = seconds.index(min(seconds))
        while first > 0 and seconds[first - 1] <= limit:
            first -= 1
        while last + 1 < len(seconds) and seconds[last + 1] <= limit:
            last += 1
        if first == last:
            first, last = max(first - 1, 0), min(last + 1, len(batches) - 1)
        return batches[first], batches[last]

    def _predict_seconds(self, tradeoff: Tradeoff, batch: int) -> float:
        return tradeoff.steps(batch) * predict_seconds(self.speeds, self.optimizer_seconds, batch)

    def _range(self, figure: Callable[[Tradeoff], float]) -> Range:
        value, *others = map(figure, self.tradeoffs)
        return Range(value, min(value, *others), max(value, *others))


def split_stretches(
    points: Sequence[Point], steps: int, noise: Callable[[Point], float]
) -> list[tuple[float, float]]:
    """Give each point the steps that are nearest to it: pairs of their number and its noise."""
    edges = [0.0, *((a.step + b.step) / 2 for a, b in pairwise(points)), float(steps)]
    return [(b - a, noise(point)) for (a, b), point in zip(pairwise(edges), points, strict=True)]


def measure_plan(
    source: str,
    changes: Sequence[str],
    *,
    num_updates: int,
    num_examples: int,
    price: float | None,
    allow_code: bool,
    accept_data: bool,
    report: Callable[[Point | Speed], None],
) -> Plan:
    """Measure noise, speed and memory of a recipe or a run.

    Args:
        source: a recipe, or the folder of a run.
        changes: `section.key=value` for the recipe.
        num_updates: updates of the trial training of a recipe.
        num_examples: examples of each noise measurement.
        price: of this machine per hour.
        report: called with each measurement.

    Raises:
        RecipeError, LedgerError: no batch size can be advised; and what `build` raises.
    """
    if price is not None and not (math.isfinite(price) and price > 0):
        raise RecipeError(f"--price-per-hour is {price}. Expected a number above 0.")
    folder = Path(source)
    if is_run(folder):
        recipe = change_run_recipe(folder, changes)
        allow_code = permit_code(folder, recipe, allow_code=allow_code)
        setup = build(recipe, allow_code=allow_code, fresh=False)
        num_steps = _count_updates(folder, setup, accept_data=accept_data)
        points = measure.measure_checkpoints(setup, folder, num_examples)
    else:
        recipe, _, allow_code = load_recipe(source, changes, allow_code=allow_code)
        setup = build(recipe, allow_code=allow_code)
        num_steps = setup.order.num_steps(recipe.run.epochs)
        points = measure.measure_training(setup, min(num_updates, num_steps), num_examples)
    measure.check_noise(setup)
    num_train = len(setup.splits.train)
    return Plan(
        points=list(_report_each(points, report)),
        speeds=_measure_speeds(setup, report),
        optimizer_seconds=speed.measure_optimizer(setup),
        steps=num_steps,
        batch=min(setup.recipe.batch.size, num_train),
        num_examples=num_train,
        price_per_hour=price,
    )


def _measure_speeds(setup: Setup, report: Callable[[Speed], None]) -> list[Speed]:
    speeds = list(_report_each(speed.measure_speeds(setup), report))
    if not speeds:
        raise RecipeError(
            "a single example does not fit in memory, so no batch size can be advised. Take a "
            "smaller model, or another device by --set run.device=..."
        )
    return speeds


def _report_each(measurements: Iterator[T], report: Callable[[T], None]) -> Iterator[T]:
    for measurement in measurements:
        report(measurement)
        yield measurement


def _count_updates(folder: Path, setup: Setup, *, accept_data: bool) -> int:
    """Count the updates of a run, and compare its data with those here."""
    checkpoint = find_newest(folder, setup.recipe).checkpoint
    if checkpoint is None:
        return 0
    compare_data(folder, checkpoint, setup, accept=accept_data)
    return checkpoint.step
