"""Sections 4 to 6 of docs/scaling-rules.md: norms of weights, Mean against Max, local minima."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rules.minima import BATCHES, NUM_RUNS, OPTIMISERS, PENALTIES, STARTS, roots
from rules.norms import NUM_UPDATES, SIZES
from rules.verdicts import NORM_TOLERANCE
from rules.worst import GRIDS, MODELS
from svg import Axis, Series, plot

__all__ = ["chosen", "minima", "norms", "norms_plot", "predicted", "worst"]

KEPT = 1e-4  # |w| has five figures in the raw result
SMALL = 1e-3  # losses below it are written with a power of ten
Raw = Mapping[str, Any]
START_HEADS = {"local minimum": "in the local minimum", "near 0": "near 0", "uniform": "uniform"}


def norms(raw: Raw) -> list[str]:
    """The table of the growth of |w|, and what follows from it."""
    rows, grown = [], {}
    for reduction in ("mean", "sum"):
        curves = {size: _curve(raw, reduction, size) for size in SIZES}
        grown[reduction] = [curve[-1] - curve[0] for curve in curves.values()]
        cells = " | ".join(f"{curve[0]:.3f} to {curve[-1]:.3f}" for curve in curves.values())
        rows.append(f"| {reduction.capitalize()} | {cells} |")
    spread = {name: max(values) / min(values) for name, values in grown.items()}
    depends = "does not depend" if spread["mean"] <= 1 + NORM_TOLERANCE else "depends"
    apart = max(
        abs(a - b)
        for size in SIZES
        for a, b in zip(_curve(raw, "sum at lr / B", size), _curve(raw, "mean", size), strict=True)
    )
    return [
        "| | " + " | ".join(f"B = {size}" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        *rows,
        "",
        f"Under Mean the growth {depends} on the batch size: the largest over the smallest is "
        f"{spread['mean']:.2f}. Under Sum it is {spread['sum']:.1f}, for batches of which the "
        f"largest is {SIZES[-1] / SIZES[0]:g} times the smallest. Over all updates |w| under "
        f"Sum at lr / B is within {max(apart, KEPT):.0e} of that under Mean.",
    ]


def _curve(raw: Raw, reduction: str, size: int) -> list[float]:
    """|w| at each look, in the mean over seeds."""
    runs = raw["norms"]["runs"]
    own = [r["norms"] for r in runs if (r["reduction"], r["size"]) == (reduction, size)]
    return [mean(values) for values in zip(*own, strict=True)]


def norms_plot(raw: Raw) -> str:
    """|w| against the updates, as SVG."""
    every = raw["norms"]["runs"][0]["every"]
    series = []
    for number, size in enumerate(SIZES):
        for reduction, dash in (("sum", ""), ("mean", "5 4")):
            curve = _curve(raw, reduction, size)
            points = [(every * look, value) for look, value in enumerate(curve)]
            series.append(Series(f"{reduction.capitalize()}, B = {size}", points, number, dash))
    highest = max(value for each in series for _, value in each.points)
    lowest = math.floor(min(value for each in series for _, value in each.points))
    ticks = [lowest + tick / 2 for tick in range(math.ceil(2 * (highest - lowest)) + 1)]
    x = Axis("updates", [NUM_UPDATES * part / 5 for part in range(6)])
    return plot("Norms of the weights under Sum and Mean", x, Axis("|w|", ticks), series)


def worst(raw: Raw) -> list[str]:
    """The table of Mean against Max, and what follows from it."""
    found = {(m, r): chosen(raw, m, r) for m in MODELS for r in GRIDS}
    rows = [
        f"| {model}, {reduction.capitalize()} | {runs[0]['lr']:g} | "
        f"{_spread(runs, 'train', 'mean')} | {_spread(runs, 'train', 'max')} | "
        f"{_spread(runs, 'test', 'mean')} | {_spread(runs, 'test', 'max')} | "
        f"{100 * mean(run['test']['error'] for run in runs):.1f} % |"
        for (model, reduction), runs in found.items()
    ]
    return [
        "| | rate | mean | worst | held out: mean | worst | error |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(_compared(model, found[model, "mean"], found[model, "max"]) for model in MODELS),
        *_edges(found),
    ]


def _edges(found: Mapping[tuple[str, str], Any]) -> list[str]:
    """A line of the list: which rates a wider grid might better."""
    at_end = [
        f"{model}, {reduction.capitalize()}"
        for (model, reduction), runs in found.items()
        if runs[0]["lr"] in (GRIDS[reduction][0], GRIDS[reduction][-1])
    ]
    return [f"- At an end of its grid is the rate of: {'; '.join(at_end)}."] if at_end else []


def chosen(raw: Raw, model: str, reduction: str) -> list[Mapping[str, Any]]:
    """The runs at the rate that does best by what is minimised."""
    runs = [r for r in raw["worst"]["runs"] if (r["model"], r["reduction"]) == (model, reduction)]
    by_rate = [[run for run in runs if run["lr"] == lr] for lr in GRIDS[reduction]]

    def minimised(own: Sequence[Mapping[str, Any]]) -> float:
        diverged = any(run["train"] is None for run in own)
        return math.inf if diverged else mean(run["train"][reduction] for run in own)

    return min(by_rate, key=minimised)


def _spread(runs: Sequence[Mapping[str, Any]], part: str, what: str) -> str:
    values = [run[part][what] for run in runs]
    form = ".3f" if mean(values) >= SMALL else ".0e"
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def _compared(model: str, by_mean: Any, by_max: Any) -> str:
    """A line of the list: which of the two has the lower worst and mean loss, on both parts."""
    said = []
    for part, where in (("train", "on what it is trained on"), ("test", "held out")):
        lower = {
            what: "Max" if _mean(by_max, part, what) < _mean(by_mean, part, what) else "Mean"
            for what in ("mean", "max")
        }
        said.append(f"{where} the lower mean loss is {lower['mean']}'s, the lower worst loss ")
        said[-1] += f"{lower['max']}'s"
    return f"- {model}: {'; '.join(said)}."


def _mean(runs: Any, part: str, what: str) -> float:
    return float(mean(run[part][what] for run in runs))


def predicted(start: str, penalty: float) -> float:
    """The share that plain descent takes to the global minimum: what starts below the barrier."""
    places = roots(penalty)
    if len(places) == 1:
        return 1.0
    barrier = places[1]
    if start == "uniform":
        return (barrier + 2) / 4
    if start == "near 0":
        return (1 + math.erf(barrier / 0.1 / math.sqrt(2))) / 2
    return float(roots(0.0)[-1] < barrier)


def minima(raw: Raw) -> list[str]:
    """The table of shares, with what is predicted of plain descent."""
    shares = {
        (r["size"], r["penalty"], r["start"], r["optimiser"]): r["below"]
        for r in raw["minima"]["runs"]
    }
    cells = [(start, penalty) for start in STARTS for penalty in PENALTIES]
    head = " | ".join(f"{START_HEADS[start]}, c = {penalty:g}" for start, penalty in cells)
    rows = [
        f"| {optimiser}, B = {size} | "
        + " | ".join(f"{100 * shares[size, c, s, optimiser]:.0f}" for s, c in cells)
        + " |"
        for size in BATCHES
        for optimiser in OPTIMISERS
    ]
    plain = " | ".join(f"{100 * predicted(s, c):.0f}" for s, c in cells)
    whole = {(s, c): shares[BATCHES[-1], c, s, "SGD"] for s, c in cells}
    inside = sum(_is_near(share, predicted(*cell)) for cell, share in whole.items())
    return [
        f"| % that escape | {head} |",
        "|---|" + "---|" * len(cells),
        *rows,
        f"| predicted of descent | {plain} |",
        "",
        f"SGD on all examples is within three standard errors of the prediction in {inside} of "
        f"{len(whole)} columns.",
        _escaping(shares),
    ]


def _is_near(share: float, expected: float) -> bool:
    return abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / NUM_RUNS) + 1e-9


def _escaping(shares: Mapping[Any, float]) -> str:
    """Who leaves the local minimum, where there is one, by the noise of single examples."""
    said = []
    for size in BATCHES:
        start = [(o, shares[size, 0.0, "local minimum", o]) for o in OPTIMISERS]
        leaving = [f"{o} ({100 * share:.0f} %)" for o, share in start if share > 0]
        said.append(f"at B = {size} {', '.join(leaving) if leaving else 'none'}")
    return f"From the local minimum, without a penalty, there escape: {'; '.join(said)}."
