"""Tables and plots of docs/scaling-rules.md, or of docs/scaling-rules-digits.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rules.batches import RULES, SIZES
from rules.common import REFERENCE_SIZE
from rules.data import DATA, keep_smaller
from rules.norms import NUM_UPDATES
from rules.norms import SIZES as NORM_SIZES
from rules.tables import STUDIES, fit_steps, format_tables, mean_norms, select_runs
from rules.tuning import SIZES as STEP_SIZES
from rules.verdicts import TOLERANCE, distance
from svg import Axis, Series, plot
from tables import update_document

__all__ = ["DOCUMENT", "draw_plots", "publish"]

NAME = DATA.result.replace("_", "-")
DOCUMENT = Path(__file__).parents[2] / "docs" / f"{NAME}.md"
Raw = Mapping[str, Any]


def publish(raw: Raw) -> None:
    """Write the tables and the plots of a raw result."""
    data = raw.get("data", "fashion_mnist")
    assert data == DATA.name, f"the raw result is of {data}; {DOCUMENT.name} is of {DATA.name}"
    update_document(DOCUMENT, format_tables(raw), draw_plots(raw))


def draw_plots(raw: Raw) -> dict[str, str]:
    """Draw every plot as SVG, by name."""
    return {
        **{study: _draw_distances(raw, study) for study in STUDIES},
        "norms": _draw_norms(raw),
        "steps": _draw_steps(raw),
    }


def _draw_distances(raw: Raw, study: str) -> str:
    cells = select_runs(raw, study)
    reference = cells[None, REFERENCE_SIZE]
    x = Axis("batch size", (*keep_smaller((SIZES[0], 1024, 4096, 16384)), SIZES[-1]), is_log=True)
    y = Axis("distance in training loss", (0.01, 0.03, 0.1, 0.3, 1, 3), is_log=True)
    series = []
    for number, rule in enumerate(RULES[STUDIES[study].optimizer]):
        distances = [(size, distance(cells[rule, size], reference)) for size in SIZES]
        points = [(size, value) for size, value in distances if math.isfinite(value)]
        series.append(Series(rule, points, number, marks=True))
    ends = [(size, TOLERANCE) for size in (SIZES[0], SIZES[-1])]
    series.append(Series("tolerance", ends, 6, dash="5 4"))
    return plot(f"{STUDIES[study].title}: distance from the reference at 32", x, y, series)


def _draw_norms(raw: Raw) -> str:
    every = raw["norms"]["runs"][0]["every"]
    series = []
    for number, size in enumerate(NORM_SIZES):
        for reduction, dash in (("sum", ""), ("mean", "5 4")):
            curve = mean_norms(raw, reduction, size)
            points = [(every * look, value) for look, value in enumerate(curve)]
            series.append(Series(f"{reduction.capitalize()}, B = {size}", points, number, dash))
    highest = max(value for each in series for _, value in each.points)
    lowest = math.floor(min(value for each in series for _, value in each.points))
    ticks = [lowest + tick / 2 for tick in range(math.ceil(2 * (highest - lowest)) + 1)]
    x = Axis("updates", [NUM_UPDATES * part / 5 for part in range(6)])
    return plot("Norms of the weights under Sum and Mean", x, Axis("|w|", ticks), series)


def _draw_steps(raw: Raw) -> str:
    points, fit, prediction = fit_steps(raw)
    sizes = [2 ** (power / 4) for power in range(round(4 * math.log2(STEP_SIZES[-1])) + 1)]
    low = math.floor(math.log10(min(s for _, s in points)))
    high = math.ceil(math.log10(max(fit.steps(1), prediction.steps(1))))
    x = Axis("batch size", STEP_SIZES, is_log=True)
    y = Axis("updates to the target", [10.0**power for power in range(low, high + 1)], is_log=True)
    fit_points, prediction_points = ([(b, c.steps(b)) for b in sizes] for c in (fit, prediction))
    series = [
        Series("measured, rate tuned", points, 1, marks=True, line=False),
        Series(f"fitted, B_crit = {fit.b_crit:,.0f}", fit_points, 0),
        Series(f"predicted, B_simple = {prediction.b_crit:,.0f}", prediction_points, 2, dash="5 4"),
    ]
    return plot("Updates to a training loss against the batch size", x, y, series)
