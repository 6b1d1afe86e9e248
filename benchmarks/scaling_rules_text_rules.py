"""Sections 1 to 3 of docs/scaling-rules.md: rules, the held-out gap, warm-up."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scaling_rules_batches import AGAIN, RULES, SIZES
from scaling_rules_common import EPOCHS, REFERENCE_SIZE, SEEDS
from scaling_rules_svg import Axis, Series, plot
from scaling_rules_verdicts import GAP_AT, TOLERANCE, distance, final, gap
from scaling_rules_warmup import ARMS
from scaling_rules_warmup import SIZES as WARMUP_SIZES

__all__ = ["gaps", "rules", "rules_plot", "warm_ups"]

Raw = Mapping[str, Any]
Run = Mapping[str, Any]
NAMES = {"sgd": "SGD", "adamw": "AdamW"}


def cells(raw: Raw, optimizer: str) -> dict[tuple[str | None, int], list[Run]]:
    """Runs by rule and size; those of the reference by None, the second group left out."""
    found: dict[tuple[str | None, int], list[Run]] = {}
    for run in raw["batches"]["runs"]:
        if run["optimizer"] == optimizer and run["seed"] not in AGAIN:
            found.setdefault((run["rule"], run["size"]), []).append(run)
    return found


def again(raw: Raw, optimizer: str) -> list[Run]:
    """The second group of the reference."""
    runs = raw["batches"]["runs"]
    return [r for r in runs if r["optimizer"] == optimizer and r["seed"] in AGAIN]


def rules(raw: Raw, optimizer: str) -> list[str]:
    """The table of one optimiser, and what follows from it."""
    found = cells(raw, optimizer)
    reference = found[None, REFERENCE_SIZE]
    itself = distance(again(raw, optimizer), reference)
    rows = []
    for rule in RULES[optimizer]:
        distances = [distance(found[rule, size], reference) for size in SIZES]
        rows.append(f"| {rule} | {' | '.join(_judged(d) for d in distances)} |")
    return [
        f"| {NAMES[optimizer]}: distance at | " + " | ".join(f"{size:,}" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
        *rows,
        "",
        f"The reference is {itself:.3f} from itself.",
        *(_where(rule, found, reference) for rule in RULES[optimizer]),
        f"- The closest is {_closest(optimizer, found, reference)}.",
    ]


def _closest(optimizer: str, found: Mapping[Any, list[Run]], reference: list[Run]) -> str:
    """Which rule is closest to the reference at each size; sizes of one rule together."""
    best: dict[str, list[str]] = {}
    for size in SIZES:
        apart = {rule: distance(found[rule, size], reference) for rule in RULES[optimizer]}
        best.setdefault(min(apart, key=lambda rule: apart[rule]), []).append(f"{size:,}")
    return "; ".join(f"*{rule}* at {' and '.join(sizes)}" for rule, sizes in best.items())


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


def rules_plot(raw: Raw, optimizer: str) -> str:
    """Distance against the batch size, as SVG."""
    found = cells(raw, optimizer)
    reference = found[None, REFERENCE_SIZE]
    x = Axis("batch size", (SIZES[0], 1024, 4096, 16384, SIZES[-1]), is_log=True)
    y = Axis("distance in training loss", (0.01, 0.03, 0.1, 0.3, 1, 3), is_log=True)
    series = []
    for number, rule in enumerate(RULES[optimizer]):
        every = [(size, distance(found[rule, size], reference)) for size in SIZES]
        points = [(size, value) for size, value in every if math.isfinite(value)]
        series.append(Series(rule, points, number, marks=True))
    ends = [(size, TOLERANCE) for size in (SIZES[0], SIZES[-1])]
    series.append(Series("tolerance", ends, 6, dash="5 4"))
    return plot(f"{NAMES[optimizer]}: distance from the reference at 32", x, y, series)


def gaps(raw: Raw, optimizer: str) -> list[str]:
    """Held-out gaps at one training loss, by rule and size."""
    found, at = cells(raw, optimizer), GAP_AT[optimizer]
    own = [gap(run, at) for run in [*found[None, REFERENCE_SIZE], *again(raw, optimizer)]]
    rows: list[str] = []
    shown: dict[Any, Any] = {}
    for rule in RULES[optimizer]:
        each = [[gap(run, at) for run in found[rule, size]] for size in SIZES]
        shown |= {(rule, size): gs for size, gs in zip(SIZES, each, strict=True) if None not in gs}
        rows.append(f"| {rule} | {' | '.join(_gap(gs) for gs in each)} |")
    return [
        f"| {NAMES[optimizer]}: gap at training loss {at:g} | "
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
    losses = [one["loss"] for one in there]
    errors = [100 * one["error"] for one in there]
    return f"{mean(losses):.3f} ± {stdev(losses):.3f}; {mean(errors):.1f} %"


def _largest_gap(shown: Mapping[Any, Any], own: Any) -> str:
    """How the cells that all seeds reach lie about the reference."""
    if not shown or None in own:
        return "No comparison follows."
    expected = mean(one["loss"] for one in own)
    means = {cell: mean(one["loss"] for one in found) for cell, found in shown.items()}
    larger = sum(value > expected for value in means.values())
    (rule, size), most = max(means.items(), key=lambda item: item[1])
    (low_rule, low_size), least = min(means.items(), key=lambda item: item[1])
    return (
        f"Of the {len(means)} cells that all seeds reach, {larger} have a larger mean gap in loss "
        f"than that; the largest is {most:.3f} (*{rule}* at {size:,}), the smallest {least:.3f} "
        f"(*{low_rule}* at {low_size:,})."
    )


def warm_ups(raw: Raw) -> list[str]:
    """The table of warm-ups."""
    runs = raw["warmup"]["runs"]
    found = {
        (arm, size): [run for run in runs if (run["arm"], run["size"]) == (arm, size)]
        for arm, size in {(run["arm"], run["size"]) for run in runs}
    }
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
        *(_order(found, size) for size in WARMUP_SIZES),
    ]


def _ends(runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """Training loss and test error after the last epoch."""
    diverged = sum(len(run["train_loss"]) < EPOCHS for run in runs)
    if diverged:
        return f"{diverged} of {len(SEEDS)} diverge"
    errors = [100 * run["test_error"][-1] for run in runs]
    apart = abs(math.log(final(runs) / final(reference)))
    word = "matches" if apart <= TOLERANCE else "differs"
    return f"{final(runs):.3f}, {mean(errors):.2f} ± {stdev(errors):.2f} %, {word}"


def _order(found: Mapping[Any, list[Run]], size: int) -> str:
    """A line of the list: the arms by their training loss."""
    arms = sorted(ARMS, key=lambda arm: final(found[arm, size]))
    return f"- At {size:,}, from the lowest training loss to the highest: {', '.join(arms)}."
