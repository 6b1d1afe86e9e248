"""What the runs of a comparison tell: curves at equal examples, figures, and differences in pairs.

Training loss: mean over the examples from the end of the first epoch, where curves depend on the
initial weights most, to where the shortest run ends. Then each figure on the held-out data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from anybatch.advice.curves import Curve, Numbers, choose_grid
from anybatch.advice.pairs import MOST, PairedDifference, compare_pairs, count_needed_pairs
from anybatch.advice.plots import Band
from anybatch.advice.trial import Trial, read_curve, read_outcome

__all__ = ["Comparison", "Figure", "compare_trials", "list_verdicts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of all runs that are done."""

    values: Mapping[str, Mapping[int, float]]  # by recipe, by seed
    differences: Mapping[
        str, PairedDifference | None
    ]  # of each recipe but the first from the first

    def spread(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation (n - 1) of a recipe; nan of too few runs."""
        values = list(self.values[name].values())
        return (
            mean(values) if values else math.nan,
            stdev(values) if len(values) > 1 else math.nan,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the runs that are done tell."""

    names: Sequence[str]
    figures: Mapping[str, Figure]
    start: int  # examples from which the training loss is averaged; 0: there is only one epoch
    stop: int
    window: int  # examples over which the curves are smoothed
    grid: Numbers  # examples at which they are compared
    curves: Mapping[str, Mapping[int, Numbers]]  # by recipe, by seed

    @property
    def others(self) -> Sequence[str]:
        """All but the first, which they are compared with."""
        return self.names[1:]

    def bands(self) -> dict[str, Band]:
        """Mean of a recipe's curves, and a standard deviation to both sides."""
        found = {}
        for name, curves in self.curves.items():
            at_places = list(zip(*(curve.tolist() for curve in curves.values()), strict=True))
            means = [mean(values) for values in at_places]
            spreads = [stdev(values) if len(values) > 1 else 0.0 for values in at_places]
            if means:
                found[name] = Band(
                    middle=means,
                    low=[m - s for m, s in zip(means, spreads, strict=True)],
                    high=[m + s for m, s in zip(means, spreads, strict=True)],
                )
        return found

    def difference_bands(self) -> dict[str, Band]:
        """Mean difference from the first at each place, and its interval; of 2 pairs or more."""
        first, found = self.curves[self.names[0]], {}
        for name in self.others:
            other = self.curves[name]
            seeds = sorted(first.keys() & other.keys())
            if len(seeds) < 2:
                continue
            pairs = [
                compare_pairs(
                    [float(first[s][i]) for s in seeds], [float(other[s][i]) for s in seeds]
                )
                for i in range(len(self.grid))
            ]
            found[f"{name} minus {self.names[0]}"] = Band(
                middle=[p.mean for p in pairs],
                low=[p.low for p in pairs],
                high=[p.high for p in pairs],
            )
        return found

    def rows(self) -> list[dict[str, str]]:
        """A table: a row a figure."""
        rows = []
        for title, figure in self.figures.items():
            row = {"figure": title}
            row |= {name: "{:.4g} ± {:.2g}".format(*figure.spread(name)) for name in self.names}
            for name in self.others:
                row[f"{name} minus {self.names[0]}"] = _format_difference(figure.differences[name])
            rows.append(row)
        return rows

    def texts(self) -> list[str]:
        """How the figures are meant."""
        left_out = "the first epoch is left out" if self.start else "the only epoch there is"
        return [
            f"Training loss: mean over examples {self.start:,} to {self.stop:,} of each run "
            f"({left_out}), each example with the loss that it had when it was met. Losses are "
            f"means over examples, without penalties.",
            "Mean ± standard deviation over seeds. In brackets: 95 % interval of the mean "
            "difference within a seed, by Student's t.",
        ]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "training_loss_from": self.start,
            "training_loss_to": self.stop,
            "window": self.window,
            "figures": {
                title: {
                    "values": {n: list(figure.values[n].values()) for n in self.names},
                    "seeds": {n: list(figure.values[n]) for n in self.names},
                    "mean": {n: figure.spread(n)[0] for n in self.names},
                    "spread": {n: figure.spread(n)[1] for n in self.names},
                    f"minus {self.names[0]}": {
                        n: None if d is None else asdict(d) for n, d in figure.differences.items()
                    },
                }
                for title, figure in self.figures.items()
            },
            "examples": self.grid.tolist(),
            "curves": {name: band.middle for name, band in self.bands().items()},
        }


def compare_trials(trials: Sequence[Trial]) -> Comparison | None:
    """What the runs that are done tell, from their records; None: none is done."""
    names = list(dict.fromkeys(trial.name for trial in trials))
    outcomes = {(t.name, t.seed): (t, done) for t in trials if (done := read_outcome(t.folder))}
    if not outcomes:
        return None
    curves = {key: read_curve(t.folder, done.steps) for key, (t, done) in outcomes.items()}
    grid, window = choose_grid(list(curves.values()))
    start, stop = _choose_range(list(curves.values()))
    values = {key: {"training loss": c.mean(start, stop)} for key, c in curves.items()}
    for key, (_, done) in outcomes.items():
        values[key] |= {f"held-out {name}": value for name, value in done.held_out.items()}
    smooth = {key: c.smoothed(grid, window) for key, c in curves.items()}
    return Comparison(
        names=names,
        figures={
            title: _make_figure(names, values, title) for title in _list_shared(values.values())
        },
        start=start,
        stop=stop,
        window=window,
        grid=grid,
        curves={name: {s: smooth[n, s] for n, s in smooth if n == name} for name in names},
    )


def _choose_range(curves: Sequence[Curve]) -> tuple[int, int]:
    """From after the first epoch to where the shortest run ends."""
    start, stop = max(c.first_epoch for c in curves), min(c.examples for c in curves)
    return (start, stop) if start < stop else (0, stop)


def _list_shared(values: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the figures that all runs have."""
    first, *others = values
    return [name for name in first if all(name in other for other in others)]


def _make_figure(
    names: Sequence[str], values: Mapping[tuple[str, int], Mapping[str, float]], title: str
) -> Figure:
    found = {n: {s: values[m, s][title] for m, s in values if m == n} for n in names}
    differences = {}
    for name in names[1:]:
        seeds = sorted(found[names[0]].keys() & found[name].keys())
        first, other = ([found[n][seed] for seed in seeds] for n in (names[0], name))
        differences[name] = compare_pairs(first, other) if seeds else None
    return Figure(values=found, differences=differences)


def _format_difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return "no pair"
    return f"{difference.mean:.3g} ({difference.low:.3g} to {difference.high:.3g})"


def list_verdicts(found: Comparison) -> list[str]:
    """Say for each figure and each recipe but the first whether the runs tell the two apart."""
    return [
        _state_verdict(title, found.names[0], other, figure.differences[other])
        for title, figure in found.figures.items()
        for other in found.others
    ]


def _state_verdict(title: str, first: str, other: str, difference: PairedDifference | None) -> str:
    figure = title[:1].upper() + title[1:]
    if difference is None:
        return f"{figure}: no seed has a run of both {first} and {other} yet."
    if difference.pairs == 1:
        return f"{figure}: one pair cannot tell {other} from {first}. Take more: --seeds 5"
    pairs = f"{difference.pairs} pairs"
    if difference.mean == difference.spread == 0:
        return f"{figure}: {other} and {first} are equal in all {pairs}."
    if difference.low <= 0 <= difference.high:
        return f"{figure}: {pairs} cannot tell {other} from {first}. {_estimate_pairs(difference)}"
    word = "lower" if difference.mean < 0 else "higher"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return (
        f"{figure}: {other} is {word} than {first} by {abs(difference.mean):.3g} ({low:.3g} to "
        f"{high:.3g}), as {pairs} show."
    )


def _estimate_pairs(difference: PairedDifference) -> str:
    needed = count_needed_pairs(difference)
    if needed is None:
        return f"More than {MOST:,} pairs would be needed: take the two as equal."
    return f"About {needed:,} would, if the difference stays {difference.mean:.3g}."
