"""Tables of docs/scaling-rules.md, from a raw result of benchmarks/scaling_rules.py."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from rules.batches import AGAIN, RULES, SIZES
from rules.common import EPOCHS, REFERENCE_SIZE, SEEDS
from rules.gap import SIZES as GAP_SIZES
from rules.hyperbola import Hyperbola, fit_curve, fit_minimum
from rules.minima import BATCHES, OPTIMISERS, PENALTIES, STARTS, predict_escapes
from rules.noise import POINTS
from rules.norms import REDUCTIONS
from rules.norms import SIZES as NORM_SIZES
from rules.steps import mean_steps
from rules.tuning import SIZES as STEP_SIZES
from rules.tuning import best_rate
from rules.verdicts import GAP_AT, TOLERANCE, distance, final_loss, interpolate_gap, sum_minutes
from rules.warmup import ARMS
from rules.warmup import SIZES as WARMUP_SIZES
from rules.worst import GRIDS, MODELS
from tables import format_table

__all__ = ["STUDIES", "fit_steps", "format_tables", "holds", "mean_norms", "select_runs"]

SMALL = 1e-3  # smaller losses are written with a power of ten
WAYS = ("ledger", "two batches")
Raw = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]


class Study(NamedTuple):
    """One optimiser at one reference rate."""

    optimizer: str
    title: str


STUDIES = {
    "sgd": Study("sgd", "SGD, tuned rate"),
    "smaller": Study("sgd", "SGD, a quarter of it"),
    "adamw": Study("adamw", "AdamW"),
}


def format_tables(raw: Raw) -> dict[str, str]:
    """Format every table of the document, by name."""
    return {
        "machine": _format_machine(raw),
        **{f"distance-{study}": _format_distances(raw, study) for study in STUDIES},
        "weight-norms": _format_weight_norms(raw),
        "gap": _format_gaps_by_size(raw),
        **{f"gap-{study}": _format_gaps_by_rule(raw, study) for study in STUDIES},
        "warm-up": _format_warm_ups(raw),
        "norms": _format_norms(raw),
        "rates": _format_rates(raw),
        "worst": _format_worst(raw),
        "minima": _format_minima(raw),
        "noise": _format_noise(raw),
        "steps": _format_steps(raw),
        "fit": _format_fit(raw),
    }


def _format_machine(raw: Raw) -> str:
    cpu, wall = sum_minutes(raw)
    processor = raw["machine"]["processor"].replace(" Processor", "")
    head = ("processor", "threads a run", "runs side by side", "CPU minutes", "minutes")
    return format_table(head, [(processor, "1", "2", f"{cpu:.0f}", f"{wall:.0f}")])


def select_runs(raw: Raw, study: str) -> dict[tuple[str | None, int], list[Mapping[str, Any]]]:
    """Return the runs of a study by rule and size.

    The rule of the reference is None. Its second group of seeds has the rule "again".
    """
    runs = raw["smaller" if study == "smaller" else "batches"]["runs"]
    cells: dict[tuple[str | None, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["optimizer"] == STUDIES[study].optimizer:
            rule = "again" if run["seed"] in AGAIN else run["rule"]
            cells.setdefault((rule, run["size"]), []).append(run)
    return cells


def _format_by_rule(
    raw: Raw, study: str, title: str, cell: Callable[[Runs], str], *last: Sequence[str]
) -> str:
    """Format a table with a row for each rule and a column for each size, and a last row."""
    cells = select_runs(raw, study)
    head = (f"{STUDIES[study].title}: {title}", *(f"{size:,}" for size in SIZES))
    rows = [
        (rule, *(cell(cells[rule, size]) for size in SIZES))
        for rule in RULES[STUDIES[study].optimizer]
    ]
    return format_table(head, [*rows, *last])


def _format_distances(raw: Raw, study: str) -> str:
    cells = select_runs(raw, study)
    reference = cells[None, REFERENCE_SIZE]
    again = distance(cells["again", REFERENCE_SIZE], reference)

    def judge(runs: Runs) -> str:
        value = distance(runs, reference)
        if not math.isfinite(value):
            return "diverges"
        return f"{value:.2f} {'holds' if holds(value) else 'breaks'}"

    last = (f"reference, other seeds, at {REFERENCE_SIZE}", f"{again:.3f}")
    return _format_by_rule(raw, study, "distance at", judge, last)


def holds(value: float) -> bool:
    """Return whether a rule with this distance holds."""
    return value <= TOLERANCE


def _format_weight_norms(raw: Raw) -> str:
    reference = select_runs(raw, "adamw")[None, REFERENCE_SIZE]
    expected = mean(run["weight_norm"] for run in reference)
    return _format_by_rule(
        raw,
        "adamw",
        "norm of the weights at",
        lambda runs: f"{mean(run['weight_norm'] for run in runs) / expected:.2f}",
    )


def _format_gaps_by_size(raw: Raw) -> str:
    rows = []
    for size in GAP_SIZES:
        runs = [run for run in raw["gap"]["runs"] if run["size"] == size]
        rows.append((f"{size:,}", f"{runs[0]['lr']:g}", *_format_gap_at_target(runs)))
    head = ("B", "rate", "training loss", "test loss", "gap in loss", "in error, points")
    return format_table(head, rows)


def _format_gap_at_target(runs: Runs) -> list[str]:
    reached = sum(run["updates"] is not None for run in runs)
    if reached < len(runs):
        return [f"reached by {reached} of {len(runs)}"]
    train, test = ([run[f"{part}_loss"] for run in runs] for part in ("train", "test"))
    gaps = [b - a for a, b in zip(train, test, strict=True)]
    errors = [100 * (run["test_error"] - run["train_error"]) for run in runs]
    return [f"{mean(train):.3f}", f"{mean(test):.3f}", _format_spread(gaps), f"{mean(errors):.1f}"]


def _format_spread(values: Sequence[float]) -> str:
    form = ".3f" if mean(values) >= SMALL else ".0e"
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def _format_gaps_by_rule(raw: Raw, study: str) -> str:
    loss = GAP_AT[STUDIES[study].optimizer]
    cells = select_runs(raw, study)
    reference = [*cells[None, REFERENCE_SIZE], *cells["again", REFERENCE_SIZE]]
    last = (f"reference, at {REFERENCE_SIZE}", _format_gap(reference, loss))
    return _format_by_rule(
        raw, study, f"gap at training loss {loss:g}", lambda runs: _format_gap(runs, loss), last
    )


def _format_gap(runs: Runs, loss: float) -> str:
    gaps = [gap for gap in (interpolate_gap(run, loss) for run in runs) if gap is not None]
    early = sum(run["train_loss"][0] <= loss for run in runs if run["train_loss"])
    if early:  # there is no gap between two epochs
        return f"in the first epoch by {early} of {len(runs)}, later by {len(gaps)}"
    if len(gaps) < len(runs):
        return f"reached by {len(gaps)} of {len(runs)}" if gaps else "not reached"
    errors = [100 * gap["error"] for gap in gaps]
    return f"{_format_spread([gap['loss'] for gap in gaps])}; {mean(errors):.1f}"


def _format_warm_ups(raw: Raw) -> str:
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in raw["warmup"]["runs"]:
        cells.setdefault((run["arm"], run["size"]), []).append(run)
    reference = cells["reference", REFERENCE_SIZE]

    def format_end(runs: Runs) -> str:
        diverged = sum(len(run["train_loss"]) < EPOCHS for run in runs)
        if diverged:
            return f"{diverged} of {len(SEEDS)} diverge"
        errors = [100 * run["test_error"][-1] for run in runs]
        end = f"{final_loss(runs):.3f}, {mean(errors):.2f} ± {stdev(errors):.2f} %"
        if runs is reference:
            return end
        off = abs(math.log(final_loss(runs) / final_loss(reference)))
        return f"{end}, {'matches' if holds(off) else 'differs'}"

    head = ("batch of", *(f"{size:,}: loss, error" for size in WARMUP_SIZES))
    rows = [(arm, *(format_end(cells[arm, size]) for size in WARMUP_SIZES)) for arm in ARMS]
    return format_table(head, [*rows, (f"reference, at {REFERENCE_SIZE}", format_end(reference))])


def mean_norms(raw: Raw, reduction: str, size: int) -> list[float]:
    """Return |w| at each look, in the mean over seeds."""
    runs = raw["norms"]["runs"]
    norms = [r["norms"] for r in runs if (r["reduction"], r["size"]) == (reduction, size)]
    return [mean(values) for values in zip(*norms, strict=True)]


def _format_norms(raw: Raw) -> str:
    rows = []
    for reduction in REDUCTIONS:
        curves = [mean_norms(raw, reduction, size) for size in NORM_SIZES]
        growths = [curve[-1] - curve[0] for curve in curves]
        spans = [f"{curve[0]:.3f} to {curve[-1]:.3f}" for curve in curves]
        rows.append(
            (reduction[0].upper() + reduction[1:], *spans, f"{max(growths) / min(growths):.2f}")
        )
    head = ("", *(f"B = {size}" for size in NORM_SIZES), "largest growth over smallest")
    return format_table(head, rows)


def _format_rates(raw: Raw) -> str:
    rates = {size: best_rate(raw, size) for size in STEP_SIZES}
    rows = [
        (f"{size:,}", f"{rate:.3g}", f"{rate / rates[STEP_SIZES[0]]:g}", f"{rate / size:.2g}")
        for size, rate in rates.items()
    ]
    head = ("B", "tuned rate under Mean", "over that at 1", "equivalent rate under Sum")
    return format_table(head, rows)


def _format_worst(raw: Raw) -> str:
    rows = []
    for model in MODELS:
        for reduction in GRIDS:
            runs = _select_best(raw, model, reduction)
            losses = [
                _format_spread([run[part][which] for run in runs])
                for part in ("train", "test")
                for which in ("mean", "max")
            ]
            error = f"{100 * mean(run['test']['error'] for run in runs):.1f} %"
            name = f"{model}, {reduction.capitalize()}"
            rows.append((name, f"{runs[0]['lr']:g}", *losses, error))
    head = ("", "rate", "mean", "worst", "held out: mean", "held out: worst", "held out: error")
    return format_table(head, rows)


def _select_best(raw: Raw, model: str, reduction: str) -> Runs:
    """Return the runs at the rate with the lowest value of the reduction that is minimised."""
    runs = [r for r in raw["worst"]["runs"] if (r["model"], r["reduction"]) == (model, reduction)]
    by_rate = [[run for run in runs if run["lr"] == lr] for lr in GRIDS[reduction]]

    def score(candidates: Runs) -> float:
        diverged = any(run["train"] is None for run in candidates)
        return math.inf if diverged else mean(run["train"][reduction] for run in candidates)

    return min(by_rate, key=score)


def _format_minima(raw: Raw) -> str:
    shares = {
        (r["size"], r["penalty"], r["start"], r["optimiser"]): r["below"]
        for r in raw["minima"]["runs"]
    }
    columns = [(start, penalty) for start in STARTS for penalty in PENALTIES]
    rows = [
        (
            f"{optimiser}, B = {size}",
            *(f"{100 * shares[size, c, s, optimiser]:.0f}" for s, c in columns),
        )
        for size in BATCHES
        for optimiser in OPTIMISERS
    ]
    predicted = [f"{100 * predict_escapes(start, penalty):.0f}" for start, penalty in columns]
    head = [f"{start}, c = {penalty:g}" for start, penalty in columns]
    return format_table(
        ("% that escape", *head), [*rows, ("predicted for plain descent", *predicted)]
    )


def _format_noise(raw: Raw) -> str:
    runs = [run["points"] for run in raw["noise"]["runs"] if run["what"] == "three ways"]
    names = ("before the first update", *(f"after epoch {epoch}" for epoch in POINTS[1:]))
    rows = [
        (name, *(_format_interval(point[way]) for way in WAYS), _format_scale(point["brute force"]))
        for name, point in zip(names, runs[0], strict=True)
    ]
    points = [point for run in runs for point in run]
    inside = [
        f"{sum(_contains(point[way], point['brute force']) for point in points)} of {len(points)}"
        for way in WAYS
    ]
    head = ("seed 0", *WAYS, "brute force")
    return format_table(head, [*rows, ("all seeds: brute force inside", *inside)])


def _format_interval(estimate: Sequence[float | None]) -> str:
    low, high = _ends(estimate)
    end = f"to {high:,.0f}" if math.isfinite(high) else "and more"
    return f"{_format_scale(estimate[0])} ({low:,.0f} {end})"


def _format_scale(value: float | None) -> str:
    return "unresolved" if value is None or value < 0 else f"{value:,.0f}"


def _ends(estimate: Sequence[float | None]) -> tuple[float, float]:
    _, low, high = estimate
    return low or 0.0, math.inf if high is None else high


def _contains(estimate: Sequence[float | None], truth: float | None) -> bool:
    """Return whether an interval contains the truth; an unresolved truth is above any number."""
    low, high = _ends(estimate)
    return low <= (math.inf if truth is None or truth < 0 else truth) <= high


def fit_steps(raw: Raw) -> tuple[list[tuple[float, float]], Hyperbola, Hyperbola]:
    """Return the points (B, updates to the target), their hyperbola, and the predicted one.

    A size that some seed does not bring to the target has no point. For the prediction, tr(S) and
    |G|^2 are averaged over seeds at each point of the run before they are divided.
    """
    steps = [(size, mean_steps(raw, size)) for size in STEP_SIZES]
    points: list[tuple[float, float]] = [(b, s) for b, s in steps if math.isfinite(s)]
    runs = [run["points"] for run in raw["noise"]["runs"] if run["what"] == "along"]
    ratios = []
    for estimates in zip(*runs, strict=True):
        variance, square = (mean(values) for values in zip(*estimates, strict=True))
        ratios.append(variance / square)
    return points, fit_curve(points), fit_minimum(mean(ratios), points)


def _format_steps(raw: Raw) -> str:
    points, *curves = fit_steps(raw)
    updates = dict(points)
    rows = []
    for size in STEP_SIZES:
        row = [f"{size:,}", f"{best_rate(raw, size):.3g}"]
        if size in updates:
            steps = [updates[size], size * updates[size], *(c.steps(size) for c in curves)]
            row += [f"{value:,.0f}" for value in steps]
        else:
            row += ["not reached by all seeds"]
        rows.append(row)
    return format_table(("B", "tuned rate", "updates", "examples", "fitted", "predicted"), rows)


def _format_fit(raw: Raw) -> str:
    points, *curves = fit_steps(raw)
    rows = []
    for name, curve in zip(("fitted", "predicted"), curves, strict=True):
        errors = {b: abs(math.log(s / curve.steps(b))) for b, s in points}
        worst = max(errors, key=lambda b: errors[b])
        error = f"{errors[worst]:.2f} (B = {worst:,})"
        rows.append((name, f"{curve.s_min:,.0f}", f"{curve.b_crit:,.0f}", error))
    return format_table(("curve", "S_min, updates", "B, examples", "largest error in ln S"), rows)
