"""Sections 2 and 3 of docs/scaling-rules.md: the held-out gap, warm-up."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rules.batches import RULES, SIZES
from rules.common import EPOCHS, REFERENCE_SIZE, SEEDS
from rules.document.carried import STUDIES, again, cells
from rules.gap import SIZES as GAP_SIZES
from rules.verdicts import GAP_AT, TOLERANCE, final, gap
from rules.warmup import ARMS
from rules.warmup import SIZES as WARMUP_SIZES

__all__ = ["GOYAL", "arms_at", "by_size", "extremes", "gaps", "matching", "warm_ups"]

Raw = Mapping[str, Any]
Run = Mapping[str, Any]


GOYAL = {  # top-1 error on ImageNet at 8,192, %
    "gradual": 23.74,
    "no warm-up": 24.84,
    "constant": 25.88,
    "square root": 26.22,
    "unscaled": 41.67,
}


def by_size(raw: Raw) -> list[str]:
    """The table of the gap at the target of section 8, for each batch size."""
    runs = raw["gap"]["runs"]
    found = {size: [run for run in runs if run["size"] == size] for size in GAP_SIZES}
    rows = [f"| {size:,} | {own[0]['lr']:g} | {_there(own)} |" for size, own in found.items()]
    return [
        "| B | rate | training loss | test loss | gap in loss | in error, points |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"The gap in loss is {extremes(raw)}.",
    ]


def _there(own: Sequence[Run]) -> str:
    """What all seeds have at the target, or how many get there."""
    reached = sum(run["updates"] is not None for run in own)
    if reached < len(own):
        return f"reached by {reached} of {len(own)} | | | "
    return (
        f"{_mean(own, 'train_loss'):.3f} | {_mean(own, 'test_loss'):.3f} | "
        f"{_spread(_apart(own, 'loss'))} | {100 * mean(_apart(own, 'error')):.1f}"
    )


def extremes(raw: Raw) -> str:
    """At which sizes the gap in loss is smallest and largest, of those that all seeds reach."""
    runs = raw["gap"]["runs"]
    short = {run["size"] for run in runs if run["updates"] is None}
    each = {
        size: mean(_apart([run for run in runs if run["size"] == size], "loss"))
        for size in GAP_SIZES
        if size not in short
    }
    if len(each) < 2:
        return "not compared, since fewer than two sizes reach it"
    least, most = min(each, key=lambda s: each[s]), max(each, key=lambda s: each[s])
    return f"smallest at {least:,} ({each[least]:.3f}) and largest at {most:,} ({each[most]:.3f})"


def _apart(runs: Sequence[Run], what: str) -> list[float]:
    return [run[f"test_{what}"] - run[f"train_{what}"] for run in runs]


def _mean(runs: Sequence[Run], what: str) -> float:
    return float(mean(run[what] for run in runs))


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def gaps(raw: Raw, study: str) -> list[str]:
    """Held-out gaps at one training loss, by rule and size."""
    found, at = cells(raw, study), GAP_AT[STUDIES[study][0]]
    own = [*found[None, REFERENCE_SIZE], *again(raw, study)]
    rules = RULES[STUDIES[study][0]]
    shown = {(rule, size): found[rule, size] for rule in rules for size in SIZES}
    rows = [
        f"| {rule} | {' | '.join(_gap(shown[rule, size], at) for size in SIZES)} |"
        for rule in rules
    ]
    return [
        f"| {STUDIES[study][1]}: gap at training loss {at:g} | "
        + " | ".join(f"{size:,}" for size in SIZES)
        + " |",
        "|---|" + "---|" * len(SIZES),
        *rows,
        "",
        f"At {REFERENCE_SIZE} it is {_gap(own, at)}. {_largest_gap(shown, own, at)}",
    ]


def _gap(runs: Sequence[Run], at: float) -> str:
    there = [one for one in (gap(run, at) for run in runs) if one is not None]
    early = sum(_is_early(run, at) for run in runs)
    if early:
        return f"in the first epoch by {early} of {len(runs)}, later by {len(there)}"
    if len(there) < len(runs):
        return f"reached by {len(there)} of {len(runs)}" if there else "not reached"
    errors = [100 * one["error"] for one in there]
    return f"{_spread([one['loss'] for one in there])}; {mean(errors):.1f}"


def _is_early(run: Run, at: float) -> bool:
    """Whether it has got there at the first look, where no gap is read."""
    return any(loss <= at for loss in run["train_loss"][:1])


def _largest_gap(shown: Mapping[Any, Sequence[Run]], own: Sequence[Run], at: float) -> str:
    """How the cells that all seeds reach lie about the reference."""
    every = {cell: _mean_gap(runs, at) for cell, runs in shown.items()}
    means = {cell: value for cell, value in every.items() if value is not None}
    expected = _mean_gap(own, at)
    if not means or expected is None:
        return "No comparison follows."
    later = any(_is_early(run, at) for runs in shown.values() for run in runs)
    reached = "all seeds reach" + (" after the first epoch" if later else "")
    larger = sum(value > expected for value in means.values())
    (rule, size), most = max(means.items(), key=lambda item: item[1])
    (low_rule, low_size), least = min(means.items(), key=lambda item: item[1])
    if len(means) == 1:
        return (
            f"The one cell that {reached}, *{rule}* at {size:,}, has a "
            f"{'larger' if larger else 'smaller'} mean gap in loss than that."
        )
    return (
        f"Of the {len(means)} cells that {reached}, {larger} {'has' if larger == 1 else 'have'} "
        f"a larger mean gap in loss than that; the largest is {most:.3f} (*{rule}* at {size:,}), "
        f"the smallest {least:.3f} (*{low_rule}* at {low_size:,})."
    )


def _mean_gap(runs: Sequence[Run], at: float) -> float | None:
    """Of the loss; None where a seed has none."""
    found = [gap(run, at) for run in runs]
    losses = [one["loss"] for one in found if one is not None]
    return float(mean(losses)) if len(losses) == len(runs) else None


def warmed(raw: Raw) -> dict[tuple[str, int], list[Run]]:
    """Runs by arm and size."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in raw["warmup"]["runs"]:
        found.setdefault((run["arm"], run["size"]), []).append(run)
    return found


def arms_at(raw: Raw, size: int) -> list[str]:
    """The arms from the lowest training loss to the highest."""
    found = warmed(raw)
    return sorted(ARMS, key=lambda arm: final(found[arm, size]))


def matching(raw: Raw) -> int:
    """How many of the large batches end as the reference does."""
    found = warmed(raw)
    reference = found.pop(("reference", REFERENCE_SIZE))
    return sum(_matches(runs, reference) for runs in found.values())


def _matches(runs: Sequence[Run], reference: Sequence[Run]) -> bool:
    return abs(math.log(final(runs) / final(reference))) <= TOLERANCE


def warm_ups(raw: Raw) -> list[str]:
    """The table of warm-ups."""
    found = warmed(raw)
    reference = found["reference", REFERENCE_SIZE]
    head = " | ".join(f"{size:,}: loss, error" for size in WARMUP_SIZES)
    rows = [
        f"| {arm} | " + " | ".join(_ends(found[arm, s], reference) for s in WARMUP_SIZES) + " |"
        for arm in ARMS
    ]
    ending = _ends(reference, reference).replace(", matches", "")
    return [
        f"| batch of | {head} |",
        "|---|" + "---|" * len(WARMUP_SIZES),
        *rows,
        "",
        f"The reference at {REFERENCE_SIZE} ends at {ending}.",
        *(
            f"- At {size:,}, from the lowest training loss to the highest: "
            f"{', '.join(arms_at(raw, size))}."
            for size in WARMUP_SIZES
        ),
    ]


def _ends(runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """Training loss and test error after the last epoch."""
    diverged = sum(len(run["train_loss"]) < EPOCHS for run in runs)
    if diverged:
        return f"{diverged} of {len(SEEDS)} diverge"
    errors = [100 * run["test_error"][-1] for run in runs]
    word = "matches" if _matches(runs, reference) else "differs"
    return f"{final(runs):.3f}, {mean(errors):.2f} ± {stdev(errors):.2f} %, {word}"
