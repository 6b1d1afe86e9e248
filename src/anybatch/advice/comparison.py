"""Results of a comparison: curves at equal examples, figures, differences in pairs, verdicts.

Training loss: mean over the examples from the end of the first epoch, in which curves depend most
on the initial weights, to where the shortest run ends. Then each figure on the held-out data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from anybatch.advice.curves import Numbers, choose_grid
from anybatch.advice.pairs import MAX_PAIRS, PairedDifference, compare_pairs, count_needed_pairs
from anybatch.advice.plots import Band, Plot
from anybatch.advice.trial import Trial, read_curve, read_outcome

__all__ = ["Comparison", "Figure", "compare_trials", "list_verdicts"]

BySeed = Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of all runs that have ended."""

    values: Mapping[str, BySeed]  # by recipe
    differences: Mapping[str, PairedDifference | None]  # from the first recipe, by other recipe

    def mean(self, name: str) -> float:
        """Return the mean over a recipe's runs; nan if there is none."""
        return mean(self.values[name].values()) if self.values[name] else math.nan

    def deviation(self, name: str) -> float:
        """Return the standard deviation (n - 1) over a recipe's runs; nan below two."""
        values = self.values[name].values()
        return stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Results of the runs that have ended."""

    names: Sequence[str]
    figures: Mapping[str, Figure]
    start: int  # examples from which the training loss is averaged; 0: there is only one epoch
    stop: int
    window: int  # examples over which the curves are smoothed
    grid: Numbers  # examples at which they are compared
    curves: Mapping[str, Mapping[int, Numbers]]  # by recipe, by seed

    @property
    def others(self) -> Sequence[str]:
        """Names of all recipes but the first, which they are compared with."""
        return self.names[1:]

    @property
    def title(self) -> str:
        """Title of the curves."""
        return f"Training loss of the last {self.window:,} examples, mean over seeds"

    def make_bands(self) -> dict[str, Band]:
        """Make the mean of each recipe's curves, with a standard deviation to both sides."""
        bands = {}
        for name, curves in self.curves.items():
            places = list(zip(*(curve.tolist() for curve in curves.values()), strict=True))
            means = [mean(values) for values in places]
            spreads = [stdev(values) if len(values) > 1 else 0.0 for values in places]
            if means:
                pairs = zip(means, spreads, strict=True)
                bands[name] = Band.of((m, m - s, m + s) for m, s in pairs)
        return bands

    def make_plots(self) -> list[Plot]:
        """Make the plots of the page: curves, and their differences from the first recipe."""
        titles = {f"{self.title}, ± standard deviation": self.make_bands()}
        if differences := self._make_difference_bands():
            title = "Mean difference within a seed, with its 95 % interval at each place"
            titles[title] = differences
        grid = self.grid.tolist()
        return [
            Plot(title=title, x=grid, x_name="examples", y_name="loss", bands=bands)
            for title, bands in titles.items()
        ]

    def _make_difference_bands(self) -> dict[str, Band]:
        """Make the mean difference at each place, and its interval, if there are 2 pairs."""
        first, bands = self.curves[self.names[0]], {}
        for name in self.others:
            other = self.curves[name]
            seeds = sorted(first.keys() & other.keys())
            if len(seeds) < 2:
                continue
            pairs = [
                compare_pairs(*([float(run[s][i]) for s in seeds] for run in (first, other)))
                for i in range(len(self.grid))
            ]
            title = f"{name} minus {self.names[0]}"
            bands[title] = Band.of((pair.mean, pair.low, pair.high) for pair in pairs)
        return bands

    def make_table(self) -> list[dict[str, str]]:
        """Make a table with a row for each figure."""
        rows = []
        for title, figure in self.figures.items():
            row = {"figure": title}
            for name in self.names:
                row[name] = f"{figure.mean(name):.4g} ± {figure.deviation(name):.2g}"
            for name in self.others:
                difference, cell = figure.differences[name], "no pair"
                if difference is not None:
                    low, high = difference.low, difference.high
                    cell = f"{difference.mean:.3g} ({low:.3g} to {high:.3g})"
                row[f"{name} minus {self.names[0]}"] = cell
            rows.append(row)
        return rows

    def explain_figures(self) -> list[str]:
        """Explain what the figures mean."""
        first_epoch = "the first epoch is left out" if self.start else "the only epoch there is"
        return [
            f"Training loss: mean over examples {self.start:,} to {self.stop:,} of each run "
            f"({first_epoch}). Each example counts with its loss before the update that used it. "
            f"Losses are means over examples, without penalties.",
            "Mean ± standard deviation over seeds. In brackets: 95 % interval of the mean "
            "difference within a seed, by Student's t.",
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all results as plain values."""
        return {
            "training_loss_from": self.start,
            "training_loss_to": self.stop,
            "window": self.window,
            "figures": {
                title: {
                    "values": {n: list(figure.values[n].values()) for n in self.names},
                    "seeds": {n: list(figure.values[n]) for n in self.names},
                    "mean": {n: figure.mean(n) for n in self.names},
                    "spread": {n: figure.deviation(n) for n in self.names},
                    f"minus {self.names[0]}": {
                        n: None if d is None else asdict(d) for n, d in figure.differences.items()
                    },
                }
                for title, figure in self.figures.items()
            },
            "examples": self.grid.tolist(),
            "curves": {name: band.middle for name, band in self.make_bands().items()},
            "verdicts": list_verdicts(self),
        }


def compare_trials(trials: Sequence[Trial]) -> Comparison | None:
    """Compare the runs that have ended, by their records; None if none has."""
    names = list(dict.fromkeys(trial.name for trial in trials))
    outcomes = {(t.name, t.seed): (t, end) for t in trials if (end := read_outcome(t.folder))}
    if not outcomes:
        return None
    curves = {key: read_curve(t.folder, end.steps) for key, (t, end) in outcomes.items()}
    grid, window = choose_grid(list(curves.values()))
    start = max(curve.first_epoch for curve in curves.values())
    stop = min(curve.examples for curve in curves.values())
    start = start if start < stop else 0
    values = {key: {"training loss": c.mean(start, stop)} for key, c in curves.items()}
    for key, (_, end) in outcomes.items():
        values[key] |= {f"held-out {name}": value for name, value in end.held_out.items()}
    first, *others = values.values()
    titles = [title for title in first if all(title in other for other in others)]
    smooth = {key: c.smooth(grid, window) for key, c in curves.items()}
    return Comparison(
        names=names,
        figures={title: _make_figure(names, values, title) for title in titles},
        start=start,
        stop=stop,
        window=window,
        grid=grid,
        curves={name: {s: smooth[n, s] for n, s in smooth if n == name} for name in names},
    )


def _make_figure(
    names: Sequence[str], values: Mapping[tuple[str, int], Mapping[str, float]], title: str
) -> Figure:
    by_name = {n: {s: values[m, s][title] for m, s in values if m == n} for n in names}
    differences = {}
    for name in names[1:]:
        first, other = by_name[names[0]], by_name[name]
        seeds = sorted(first.keys() & other.keys())
        pairs = [[run[seed] for seed in seeds] for run in (first, other)]
        differences[name] = compare_pairs(*pairs) if seeds else None
    return Figure(values=by_name, differences=differences)


def list_verdicts(comparison: Comparison) -> list[str]:
    """Say for each figure and each recipe but the first whether the runs tell the two apart."""
    return [
        _state_verdict(title, comparison.names[0], other, figure.differences[other])
        for title, figure in comparison.figures.items()
        for other in comparison.others
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
        num_needed = count_needed_pairs(difference)
        outlook = f"More than {MAX_PAIRS:,} pairs would be needed: take the two as equal."
        if num_needed is not None:
            outlook = f"About {num_needed:,} would, if the difference stays {difference.mean:.3g}."
        return f"{figure}: {pairs} cannot tell {other} from {first}. {outlook}"
    word = "lower" if difference.mean < 0 else "higher"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return (
        f"{figure}: {other} is {word} than {first} by {abs(difference.mean):.3g} ({low:.3g} to "
        f"{high:.3g}), as {pairs} show."
    )
