"""Sections 2 and 3 of docs/scaling-rules.md: the held-out gap, warm-up."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scaling_rules_batches import RULES, SIZES
from scaling_rules_common import EPOCHS, REFERENCE_SIZE, SEEDS
from scaling_rules_gap import SIZES as GAP_SIZES
from scaling_rules_text_rules import STUDIES, again, cells
from scaling_rules_verdicts import GAP_AT, TOLERANCE, final, gap
from scaling_rules_warmup import ARMS
from scaling_rules_warmup import SIZES as WARMUP_SIZES

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
    rows = [
        f"| {size:,} | {own[0]['lr']:g} | {_mean(own, 'train_loss'):.3f} | "
        f"{_mean(own, 'test_loss'):.3f} | {_spread(_apart(own, 'loss'))} | "
        f"{100 * mean(_apart(own, 'error')):.1f} |"
        for size, own in found.items()
    ]
    return [
        "| B | rate | training loss | test loss | gap in loss | in error, points |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"The gap in loss is {extremes(raw)}.",
    ]


def extremes(raw: Raw) -> str:
    """At which sizes the gap in loss is smallest and largest."""
    runs = raw["gap"]["runs"]
    each = {s: mean(_apart([r for r in runs if r["size"] == s], "loss")) for s in GAP_SIZES}
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
    own = [gap(run, at) for run in [*found[None, REFERENCE_SIZE], *again(raw, study)]]
    rows: list[str] = []
    shown: dict[Any, Any] = {}
    for rule in RULES[STUDIES[study][0]]:
        each = [[gap(run, at) for run in found[rule, size]] for size in SIZES]
        shown |= {(rule, size): gs for size, gs in zip(SIZES, each, strict=True) if None not in gs}
        rows.append(f"| {rule} | {' | '.join(_gap(gs) for gs in each)} |")
    return [
        f"| {STUDIES[study][1]}: gap at training loss {at:g} | "
        + " | ".join(f"{size:,}" for size in SIZES)
        + " |",
        "|---|" + "---|" * len(SIZES),
        *rows,
        "",
        f"At {REFERENCE_SIZE} it is {_gap(own)}. {_largest_gap(shown, own)}",
    ]


def _gap(found: Sequence[Mapping[str, float] | None]) -> str:
    there = [one for one in found if one is not None]
    if len(there) < len(found):
        return f"reached by {len(there)} of {len(found)}" if there else "not reached"
    errors = [100 * one["error"] for one in there]
    return f"{_spread([one['loss'] for one in there])}; {mean(errors):.1f}"


def _largest_gap(shown: Mapping[Any, Any], own: Any) -> str:
    """How the cells that all seeds reach lie about the reference."""
    if not shown or None in own:
        return "No comparison follows."
    expected = _mean_gap(own)
    means = {cell: _mean_gap(found) for cell, found in shown.items()}
    larger = sum(value > expected for value in means.values())
    (rule, size), most = max(means.items(), key=lambda item: item[1])
    (low_rule, low_size), least = min(means.items(), key=lambda item: item[1])
    return (
        f"Of the {len(means)} cells that all seeds reach, {larger} have "
        f"a larger mean gap in loss than that; the largest is {most:.3f} (*{rule}* at {size:,}), "
        f"the smallest {least:.3f} (*{low_rule}* at {low_size:,})."
    )


def _mean_gap(found: Any) -> float:
    return float(mean(one["loss"] for one in found))


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
