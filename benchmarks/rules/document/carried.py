"""Section 1 of docs/scaling-rules.md: where each rule holds, and the norms of the weights."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from rules.batches import AGAIN, RULES, SIZES
from rules.common import REFERENCE_SIZE
from rules.data import fitting
from rules.verdicts import NORM_TOLERANCE, TOLERANCE, distance
from svg import Axis, Series, plot

__all__ = ["STUDIES", "again", "cells", "rules", "rules_plot", "weight_norms"]

Raw = Mapping[str, Any]
Run = Mapping[str, Any]
STUDIES = {  # name: the optimiser, and what heads its table
    "sgd": ("sgd", "SGD, tuned rate"),
    "smaller": ("sgd", "SGD, a quarter of it"),
    "adamw": ("adamw", "AdamW"),
}


def runs_of(raw: Raw, study: str) -> list[Run]:
    """All runs from one reference."""
    if study == "smaller":
        return list(raw["smaller"]["runs"])
    return [run for run in raw["batches"]["runs"] if run["optimizer"] == study]


def cells(raw: Raw, study: str) -> dict[tuple[str | None, int], list[Run]]:
    """Runs by rule and size; those of the reference by None, the second group left out."""
    found: dict[tuple[str | None, int], list[Run]] = {}
    for run in runs_of(raw, study):
        if run["seed"] not in AGAIN:
            found.setdefault((run["rule"], run["size"]), []).append(run)
    return found


def again(raw: Raw, study: str) -> list[Run]:
    """The second group of the reference."""
    return [run for run in runs_of(raw, study) if run["seed"] in AGAIN]


def rules(raw: Raw, study: str) -> list[str]:
    """The table of one optimiser, and what follows from it."""
    found = cells(raw, study)
    reference = found[None, REFERENCE_SIZE]
    itself = distance(again(raw, study), reference)
    rows = []
    for rule in RULES[STUDIES[study][0]]:
        distances = [distance(found[rule, size], reference) for size in SIZES]
        rows.append(f"| {rule} | {' | '.join(_judged(d) for d in distances)} |")
    return [
        f"| {STUDIES[study][1]}: distance at | " + " | ".join(f"{size:,}" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        *rows,
        "",
        f"The reference is {itself:.3f} from itself.{_unresolved(itself)}",
        *(_where(rule, found, reference) for rule in RULES[STUDIES[study][0]]),
        f"- The closest is {_closest(study, found, reference)}.",
    ]


def _unresolved(itself: float) -> str:
    """What follows where two groups of the reference are further apart than a rule may be."""
    if itself <= TOLERANCE:
        return ""
    return f" That is above {TOLERANCE:.2f}: at this rate no rule can be told to hold."


def _closest(study: str, found: Mapping[Any, list[Run]], reference: list[Run]) -> str:
    """Which rule is closest to the reference at each size; sizes of one rule together."""
    best: dict[str, list[str]] = {}
    for size in SIZES:
        apart = {rule: distance(found[rule, size], reference) for rule in RULES[STUDIES[study][0]]}
        best.setdefault(min(apart, key=lambda rule: apart[rule]), []).append(f"{size:,}")
    return "; ".join(f"*{rule}* at {', '.join(sizes)}" for rule, sizes in best.items())


def _judged(value: float) -> str:
    if not math.isfinite(value):
        return "diverges"
    return f"{value:.2f} {'holds' if value <= TOLERANCE else 'breaks'}"


def _where(rule: str, found: Mapping[Any, list[Run]], reference: list[Run]) -> str:
    """A line of the list: up to which size a rule holds."""
    held = [distance(found[rule, size], reference) <= TOLERANCE for size in SIZES]
    number = held.index(False) if False in held else len(held)
    above = [f"{size:,}" for size, is_held in zip(SIZES, held, strict=True) if is_held][number:]
    again_at = f", and again at {' and '.join(above)}" if above else ""
    if number == len(SIZES):
        return f"- *{rule}* holds at every size."
    if not number:
        return f"- *{rule}* breaks at {SIZES[0]:,} already{again_at}."
    return (
        f"- *{rule}* holds up to {SIZES[number - 1]:,} and breaks at {SIZES[number]:,}{again_at}."
    )


def weight_norms(raw: Raw, study: str) -> list[str]:
    """The table of |w| after the last epoch, over that of the reference."""
    found = cells(raw, study)
    expected = mean(run["weight_norm"] for run in found[None, REFERENCE_SIZE])
    rows = []
    kept: list[str] = []
    for rule in RULES[STUDIES[study][0]]:
        ratios = [mean(r["weight_norm"] for r in found[rule, size]) / expected for size in SIZES]
        rows.append(f"| {rule} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
        near = [s for s, r in zip(SIZES, ratios, strict=True) if abs(r - 1) <= NORM_TOLERANCE]
        kept += [f"*{rule}* at {', '.join(f'{s:,}' for s in near)}"] if near else []
    sizes = " | ".join(f"{size:,}" for size in SIZES)
    head = f"| {STUDIES[study][1]}: norm of the weights at | {sizes} |"
    last = f"Within {100 * NORM_TOLERANCE:g} % of the reference's are: {'; '.join(kept) or 'none'}."
    return [head, "|---|" + "---|" * len(SIZES), *rows, "", last]


def rules_plot(raw: Raw, study: str) -> str:
    """Distance against the batch size, as SVG."""
    found = cells(raw, study)
    reference = found[None, REFERENCE_SIZE]
    x = Axis("batch size", (*fitting((SIZES[0], 1024, 4096, 16384)), SIZES[-1]), is_log=True)
    y = Axis("distance in training loss", (0.01, 0.03, 0.1, 0.3, 1, 3), is_log=True)
    series = []
    for number, rule in enumerate(RULES[STUDIES[study][0]]):
        every = [(size, distance(found[rule, size], reference)) for size in SIZES]
        points = [(size, value) for size, value in every if math.isfinite(value)]
        series.append(Series(rule, points, number, marks=True))
    ends = [(size, TOLERANCE) for size in (SIZES[0], SIZES[-1])]
    series.append(Series("tolerance", ends, 6, dash="5 4"))
    return plot(f"{STUDIES[study][1]}: distance from the reference at 32", x, y, series)
