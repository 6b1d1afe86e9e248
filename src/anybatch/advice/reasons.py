"""Describe a plan in sentences and tables: what it recommends, why, and how far to trust it."""

import math
from collections.abc import Callable, Iterator, Sequence

from anybatch.advice.measure import Point
from anybatch.advice.plan import NEAR, Plan, Range, Row
from anybatch.advice.plots import Band, Plot
from anybatch.advice.speed import Speed

__all__ = [
    "describe_measurement",
    "list_reasons",
    "make_bands",
    "make_plots",
    "make_table",
    "recommend",
]

FIGURES: dict[str, Callable[[Row], Range]] = {
    "steps": lambda row: row.steps,
    "examples": lambda row: row.examples,
    "time": lambda row: row.seconds,
}


def recommend(plan: Plan) -> str:
    """Recommend a range of batch sizes, and say how far it may move."""
    (smallest, largest), (low, high) = plan.recommendation, plan.widest_recommendation
    return (
        f"Use batches of {smallest:,} to {largest:,} examples. They are about as fast as any on "
        f"this machine ({100 * NEAR - 100:.0f} % more time at most, or next to the fastest). As "
        f"far as the noise scale is known, the range could be {low:,} to {high:,}."
    )


def list_reasons(plan: Plan) -> list[str]:
    """List the reasons for and against the recommendation."""
    return [*_describe_machine(plan), *_describe_noise(plan), *_describe_limits(plan)]


def describe_measurement(measurement: Point | Speed) -> str:
    """Describe one measurement on a line."""
    if isinstance(measurement, Point):
        return f"noise scale {_describe_points([measurement])}"
    speed, memory = measurement.examples_per_second, measurement.peak_bytes
    return (
        f"{measurement.micro_batch:,} at a time: {_format_amount(speed)} examples/s, "
        f"{_format_bytes(memory)}"
    )


def make_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Make a table with a row for each batch size. The last is the full data set."""
    table = []
    for row in rows:
        cells = {
            "batch": f"{row.batch:,}" + (" (all)" if row is rows[-1] else ""),
            "steps": f"{row.steps.value:,.0f}",
            "between": f"{row.steps.low:,.0f} to {row.steps.high:,.0f}",
            "examples": _format_amount(row.examples.value),
            "time": _format_duration(row.seconds.value, row.seconds.value),
            "between ": _format_duration(row.seconds.low, row.seconds.high),
        }
        if row.cost is not None:
            cells["cost"] = _format_amount(row.cost.value)
        table.append({**cells, "memory": _format_bytes(row.peak_bytes)})
    return table


def make_bands(plan: Plan) -> dict[str, Band]:
    """Divide each figure by that of the recipe's own batch size, for each batch size."""
    reference = plan.predict(plan.batch)
    bands = {}
    for name, figure in FIGURES.items():
        ranges = [figure(row).times(1 / figure(reference).value) for row in plan.rows]
        bands[name] = Band.of((r.value, r.low, r.high) for r in ranges)
    return bands


def make_plots(plan: Plan) -> list[Plot]:
    """Make the plots of the page: predictions and throughput by batch size."""
    speeds = [speed.examples_per_second for speed in plan.speeds]
    return [
        Plot(
            title=f"Relative to batches of {plan.batch:,}, with the range of each prediction",
            x=[row.batch for row in plan.rows],
            x_name="batch size",
            y_name="times",
            bands=make_bands(plan),
            logarithmic=True,
        ),
        Plot(
            title="Throughput on this machine",
            x=[speed.micro_batch for speed in plan.speeds],
            x_name="examples at a time",
            y_name="examples a second",
            bands={"examples a second": Band(middle=speeds, low=speeds, high=speeds)},
            logarithmic=True,
        ),
    ]


def _describe_machine(plan: Plan) -> Iterator[str]:
    first = plan.speeds[0]
    fastest = max(plan.speeds, key=lambda speed: speed.examples_per_second)
    if fastest is not first:
        slow, fast = (_format_amount(s.examples_per_second) for s in (first, fastest))
        yield (
            f"Smaller ones use the machine badly: {slow} examples a second go through the model "
            f"one at a time, {fast} go {fastest.micro_batch:,} at a time."
        )


def _describe_noise(plan: Plan) -> Iterator[str]:
    last = plan.points[-1]
    points = _describe_points(plan.points)
    yield f"The noise scale, in examples and with its 95 % interval, was {points}."
    yield (
        f"At the critical batch size, {_format_range(plan.critical)}, steps and examples are both "
        f"twice their least. Larger batches save few steps for many examples. Up to that size, "
        f"more devices still save time. Its range is that of the noise scale, and that of the "
        f"ratio of the two: in the tasks of McCandlish et al. 2018 the noise scale was 0.05 to 8 "
        f"times the critical batch size."
    )
    if last.high == math.inf:
        yield (
            f"At the last point the mean gradient does not stand out from the noise of "
            f"{last.examples:,} examples, so the noise scale has no upper end there."
        )


def _describe_limits(plan: Plan) -> Iterator[str]:
    first, last = plan.points[0].step, plan.points[-1].step
    if last < plan.steps / 2:
        yield (
            f"Only the first {last:,} of {plan.steps:,} updates were measured. The noise scale "
            f"tends to grow as the loss falls. A trained run says more: anybatch advise RUN."
        )
    if first > plan.steps / 2:
        yield (
            f"The noise scale was measured from update {first:,} of {plan.steps:,} on, where the "
            f"run has checkpoints, and is assumed to be the same before. With run.keep = 10 there "
            f"are more."
        )
    if plan.critical.value > plan.num_examples:
        yield f"The data set of {plan.num_examples:,} examples ends before the critical batch size."
    yield (
        "Each batch size needs a learning rate of its own (anybatch scale), and the recipe's own "
        "rate must be a good one. The plan predicts the training loss, not held-out figures. "
        "Compare a few batch sizes with anybatch compare."
    )


def _describe_points(points: Sequence[Point]) -> str:
    """Describe the noise scale at each point."""
    return "; ".join(f"{_describe_point(point)} at update {point.step:,}" for point in points)


def _describe_point(point: Point) -> str:
    if point.noise == math.inf:
        return f"at least {_format_amount(point.low)}"
    return _format_range(Range(point.noise, point.low, point.high))


def _format_range(value: Range) -> str:
    middle, low, high = map(_format_amount, (value.value, value.low, value.high))
    return f"{middle} ({low} to {high})"


def _format_bytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _format_amount(value: float) -> str:
    """Format a figure with three digits."""
    if not math.isfinite(value):
        return "no end"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _format_duration(low: float, high: float) -> str:
    """Format a range of seconds, each in the unit that fits."""
    (first, unit), (last, last_unit) = _choose_unit(low), _choose_unit(high)
    if (first, unit) == (last, last_unit):
        return f"{last} {last_unit}"
    return f"{first}{'' if unit == last_unit else ' ' + unit} to {last} {last_unit}"


def _choose_unit(seconds: float) -> tuple[str, str]:
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, size = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return _format_amount(seconds / size), unit
