"""Why a plan advises what it does, and how far it can be trusted, in sentences."""

import math
from collections.abc import Iterator, Sequence

from anybatch.advice.measure import Point
from anybatch.advice.plan import NEAR, Plan, Range, Row

__all__ = [
    "describe_points",
    "format_amount",
    "format_bytes",
    "list_reasons",
    "make_table",
    "recommend",
]


def recommend(plan: Plan) -> str:
    """The recommendation: a range, and how far it may move."""
    (smallest, largest), (low, high) = plan.advised, plan.advised_at_most
    return (
        f"Use batches of {smallest:,} to {largest:,} examples. They are about as fast as any on "
        f"this machine ({100 * NEAR - 100:.0f} % more time at most, or next to the fastest); of "
        f"{low:,} to {high:,}, as far as the noise scale is known."
    )


def list_reasons(plan: Plan) -> list[str]:
    """What speaks for it, and against."""
    return [*_describe_machine(plan), *_describe_noise(plan), *_describe_limits(plan)]


def make_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A row a batch size; the last is the full data set."""
    found = []
    for row in rows:
        cells = {
            "batch": f"{row.batch:,}" + (" (all)" if row is rows[-1] else ""),
            "steps": f"{row.steps.value:,.0f}",
            "between": f"{row.steps.low:,.0f} to {row.steps.high:,.0f}",
            "examples": format_amount(row.examples.value),
            "time": _format_duration(row.seconds.value, row.seconds.value),
            "between ": _format_duration(row.seconds.low, row.seconds.high),
        }
        if row.cost is not None:
            cells["cost"] = format_amount(row.cost.value)
        found.append({**cells, "memory": format_bytes(row.peak_bytes)})
    return found


def describe_points(points: Sequence[Point]) -> str:
    """The noise scale where it was measured."""
    return "; ".join(f"{_describe_point(point)} at update {point.step:,}" for point in points)


def format_bytes(size: int) -> str:
    """Memory to a tenth."""
    return f"{size / 2**20:,.1f} MiB"


def format_amount(value: float) -> str:
    """A figure to three digits."""
    if not math.isfinite(value):
        return "no end"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _format_duration(low: float, high: float) -> str:
    """From the one to the other number of seconds, each in the unit that fits."""
    (first, unit), (last, other) = _choose_unit(low), _choose_unit(high)
    if (first, unit) == (last, other):
        return f"{last} {other}"
    return f"{first}{'' if unit == other else ' ' + unit} to {last} {other}"


def _choose_unit(seconds: float) -> tuple[str, str]:
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, size = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return format_amount(seconds / size), unit


def _format_range(found: Range) -> str:
    return (
        f"{format_amount(found.value)} ({format_amount(found.low)} to {format_amount(found.high)})"
    )


def _describe_point(point: Point) -> str:
    if point.noise == math.inf:
        return f"at least {format_amount(point.low)}"
    return _format_range(Range(point.noise, point.low, point.high))


def _describe_machine(plan: Plan) -> Iterator[str]:
    one = plan.speeds[0]
    fastest = max(plan.speeds, key=lambda speed: speed.examples_per_second)
    if fastest is not one:
        yield (
            f"Smaller ones use the machine badly: {format_amount(one.examples_per_second)} examples "
            f"a second go through the model one at a time, "
            f"{format_amount(fastest.examples_per_second)} go {fastest.micro_batch:,} at a time."
        )


def _describe_noise(plan: Plan) -> Iterator[str]:
    critical, last = plan.critical, plan.points[-1]
    places = describe_points(plan.points)
    yield f"The noise scale, in examples and with its 95 % interval, was {places}."
    yield (
        f"At the critical batch size, {_format_range(critical)}, steps and examples are both "
        f"twice their least: larger ones save few steps for many examples, and up to it more "
        f"devices still save time. Its range is that of the noise scale, and of what lies between "
        f"the two: over the tasks of McCandlish et al. 2018 the noise scale was 0.05 to 8 times "
        f"the critical batch size."
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
            f"Measured in the first {last:,} of {plan.steps:,} updates alone; the noise scale "
            f"tends to grow as the loss falls. A trained run says more: anybatch advise RUN."
        )
    if first > plan.steps / 2:
        yield (
            f"Measured from update {first:,} of {plan.steps:,} on, where the run has checkpoints, "
            f"and taken to be the same before. With run.keep = 10 there are more."
        )
    if plan.critical.value > plan.num_examples:
        yield f"The data set of {plan.num_examples:,} examples ends before the critical batch size."
    yield (
        "Each batch size needs a learning rate of its own (anybatch scale), and the recipe's own "
        "one must be a good one. What is predicted is the training loss, not held-out figures: "
        "compare a few batch sizes with anybatch compare."
    )
