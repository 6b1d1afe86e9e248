"""Sections 7 and 8 of docs/scaling-rules.md: the noise scale three ways, steps against batch."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from statistics import mean
from typing import Any

from rules.hyperbola import fitted, with_critical
from rules.noise import POINTS
from rules.steps import steps_at
from rules.tuning import GRIDS, SIZES, tuned_rate
from rules.verdicts import FIT_TOLERANCE, MISSES_OF_THIRTY
from svg import Axis, Series, plot

__all__ = [
    "measured_points",
    "misses",
    "noise",
    "predicted_scale",
    "rates",
    "steps",
    "steps_plot",
]

Raw = Mapping[str, Any]
WAYS = ("ledger", "two batches")


def noise(raw: Raw) -> list[str]:
    """The table of one seed, and how often the intervals hold over all of them."""
    runs = [r["points"] for r in raw["noise"]["runs"] if r["what"] == "three ways"]
    rows = [
        f"| {_when(epochs)} | {_interval(point['ledger'])} | {_interval(point['two batches'])} | "
        f"{_number(point['brute force'])} |"
        for epochs, point in zip(POINTS, runs[0], strict=True)
    ]
    points = [point for run in runs for point in run]
    inside = _inside(raw)
    overlap = sum(_overlap(point["ledger"], point["two batches"]) for point in points)
    agree = "agree" if misses(raw) <= MISSES_OF_THIRTY else "do not agree"
    missed = "1 miss" if misses(raw) == 1 else f"{misses(raw)} misses"
    return [
        "| seed 0 | ledger | two batches | brute force |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Over all seeds brute force is within the ledger's interval at {inside['ledger']} of "
        f"{len(points)} points and within that of two batches at {inside['two batches']}; the two "
        f"overlap at {overlap}. With {missed} of {len(WAYS) * len(points)} the "
        f"three {agree}.{_open(points)}",
    ]


def _open(points: Sequence[Mapping[str, Any]]) -> str:
    """How many intervals have no upper end, and what that says."""
    ends = [point[way][2] for point in points for way in WAYS]
    if None not in ends:
        return ""
    return (
        f" Of the {len(ends)} intervals {ends.count(None)} have no upper end: |G|² is not told "
        f"from 0 there, and they miss only a value below them. *Unresolved* is the ledger's value "
        f"there, and any value whose estimate of |G|² is not above 0."
    )


def _inside(raw: Raw) -> dict[str, int]:
    """At how many points brute force is within the interval of each of the other two."""
    runs = [r["points"] for r in raw["noise"]["runs"] if r["what"] == "three ways"]
    every = [point for run in runs for point in run]
    return {way: sum(_holds(point[way], point["brute force"]) for point in every) for way in WAYS}


def misses(raw: Raw) -> int:
    """How many intervals do not hold brute force."""
    points = sum(len(r["points"]) for r in raw["noise"]["runs"] if r["what"] == "three ways")
    return len(WAYS) * points - sum(_inside(raw).values())


def _when(epochs: int) -> str:
    return {0: "before the first update", 1: "after 1 epoch"}.get(epochs, f"after {epochs} epochs")


def _interval(found: list[float | None]) -> str:
    value, (low, high) = found[0], _ends(found)
    end = f"to {high:,.0f}" if math.isfinite(high) else "and more"
    return f"{_number(value)} ({low:,.0f} {end})"


def _number(value: float | None) -> str:
    return "unresolved" if value is None or value < 0 else f"{value:,.0f}"


def _ends(found: list[float | None]) -> tuple[float, float]:
    low, high = found[1:]
    return low or 0.0, math.inf if high is None else high


def _holds(found: list[float | None], truth: float | None) -> bool:
    """Whether an interval holds brute force; where that is unresolved it is beyond any number."""
    low, high = _ends(found)
    return low <= (math.inf if truth is None or truth < 0 else truth) <= high


def _overlap(one: list[float | None], other: list[float | None]) -> bool:
    return max(_ends(one)[0], _ends(other)[0]) <= min(_ends(one)[1], _ends(other)[1])


def measured_points(raw: Raw) -> list[tuple[float, float]]:
    """B and the updates to the target at the tuned rate, where all seeds reach it."""
    every = [(size, steps_at(raw, size)) for size in SIZES]
    return [(size, steps) for size, steps in every if math.isfinite(steps)]


def predicted_scale(raw: Raw) -> float:
    """B_simple in the mean over the updates of the run at the largest batch, and over seeds.

    At each point tr(S) and |G|^2 are averaged over seeds before they are divided.
    """
    runs = [r["points"] for r in raw["noise"]["runs"] if r["what"] == "along"]
    at_points = [
        [mean(values) for values in zip(*at, strict=True)] for at in zip(*runs, strict=True)
    ]
    return float(mean(variance / square for variance, square in at_points))


def rates(raw: Raw) -> list[str]:
    """The table of tuned rates."""
    tuned = {size: tuned_rate(raw, size) for size in SIZES}
    first = SIZES[0]
    return [
        "| B | tuned rate under Mean | over that at 1 | the same under Sum |",
        "|---|---|---|---|",
        *(
            f"| {size:,} | {lr:.3g} | {lr / tuned[first]:g} | {lr / size:.2g} |"
            for size, lr in tuned.items()
        ),
        "",
        _growth(tuned),
    ]


def _growth(tuned: Mapping[int, float]) -> str:
    """Up to which size the rate grows as the batch does, and from which it stays."""
    last, base = SIZES[-1], tuned[SIZES[0]]
    linear = list(takewhile(lambda size: tuned[size] == base * size, SIZES))
    same = list(takewhile(lambda size: tuned[size] == tuned[last], reversed(SIZES)))
    grows = f"It grows in proportion to the batch up to {linear[-1]:,}"
    if len(linear) == 1:
        grows = f"It is out of proportion to the batch at {SIZES[1]:,} already"
    stays = f", and is the same from {same[-1]:,} on" if len(same) > 1 else ""
    return (
        f"At {last:,} it is {tuned[last] / base:g} times that of single examples. {grows}{stays}."
    )


def steps(raw: Raw) -> list[str]:
    """The table of steps and examples, and the two curves."""
    points, b_simple = measured_points(raw), predicted_scale(raw)
    fit, by_noise = fitted(points), with_critical(predicted_scale(raw), points)
    rows = [
        f"| {b:,} | {tuned_rate(raw, int(b)):.3g} | {s:,.0f} | {b * s:,.0f} | "
        f"{fit.steps(b):,.0f} | {by_noise.steps(b):,.0f} |"
        for b, s in points
    ]
    off = {
        name: max(abs(math.log(s / curve.steps(b))) for b, s in points)
        for name, curve in (("fit", fit), ("noise", by_noise))
    }
    worst = max(points, key=lambda point: abs(math.log(point[1] / fit.steps(point[0]))))[0]
    describes = "describes" if off["fit"] <= FIT_TOLERANCE else "does not describe"
    predicts = "predicts" if off["noise"] <= FIT_TOLERANCE else "does not predict"
    return [
        "| B | tuned rate | updates | examples | fitted | predicted |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_missing(raw),
        f"The fit has S_min = {fit.s_min:,.0f} updates and B_crit = {fit.b_crit:,.0f} examples, "
        f"and is off by {off['fit']:.2f} at most in ln S (at {worst:,}), where "
        f"{FIT_TOLERANCE:.2f} is allowed: the hyperbola {describes} the measured steps. "
        f"B_simple is {b_simple:,.0f}, so B_crit / B_simple = {fit.b_crit / b_simple:.2f}. The "
        f"predicted curve, with B_simple for B_crit and S_min alone fitted, is off by "
        f"{off['noise']:.2f} at most: by the same criterion it {predicts} them.",
        "",
        _edges(raw),
    ]


def _missing(raw: Raw) -> list[str]:
    """The sizes that have no row."""
    missing = [size for size in SIZES if not math.isfinite(steps_at(raw, size))]
    return [f"Not reached by all seeds at B = {', '.join(map(str, missing))}."] if missing else []


def _edges(raw: Raw) -> str:
    """Whether the grids were wide enough."""
    edge = [s for s in SIZES if tuned_rate(raw, s) in (GRIDS[s][0], GRIDS[s][-1])]
    if not edge:
        return "No tuned rate is at an end of its grid."
    return f"The tuned rate is at an end of its grid at B = {', '.join(f'{s:,}' for s in edge)}."


def steps_plot(raw: Raw) -> str:
    """Updates to the target against the batch size, as SVG."""
    points = measured_points(raw)
    fit, by_noise = fitted(points), with_critical(predicted_scale(raw), points)
    sizes = [2 ** (power / 4) for power in range(round(4 * math.log2(SIZES[-1])) + 1)]
    low = 10 ** math.floor(math.log10(min(s for _, s in points)))
    high = 10 ** math.ceil(math.log10(max(fit.steps(1), by_noise.steps(1))))
    x = Axis("batch size", SIZES, is_log=True)
    decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
    y = Axis("updates to the target", [10.0**power for power in decades], is_log=True)
    series = [
        Series("measured, rate tuned", points, 1, marks=True, line=False),
        Series(f"fitted, B_crit = {fit.b_crit:,.0f}", [(b, fit.steps(b)) for b in sizes], 0),
        Series(
            f"predicted, B_simple = {by_noise.b_crit:,.0f}",
            [(b, by_noise.steps(b)) for b in sizes],
            2,
            dash="5 4",
        ),
    ]
    return plot("Updates to a training loss against the batch size", x, y, series)
