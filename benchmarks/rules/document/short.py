"""The opening of docs/scaling-rules.md: what the sections below come to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rules.batches import RULES, SIZES
from rules.common import REFERENCE_SIZE
from rules.document.carried import STUDIES, cells
from rules.document.gaps import arms_at, extremes, matching
from rules.document.noise import measured_points, misses, predicted_scale
from rules.hyperbola import fitted
from rules.target import TARGET
from rules.verdicts import MISSES_OF_THIRTY, TOLERANCE, distance
from rules.warmup import ARMS
from rules.warmup import SIZES as WARMUP_SIZES

__all__ = ["short"]

Raw = Mapping[str, Any]


def short(raw: Raw) -> list[str]:
    """A line of the list for each question."""
    return [
        *(f"- {STUDIES[study][1]}: {_holding(raw, study)}." for study in STUDIES),
        f"- Warm-up: {'; '.join(_lowest(raw, size) for size in WARMUP_SIZES)}. Of these "
        f"{len(ARMS) * len(WARMUP_SIZES)} large batches {matching(raw) or 'none'} match the small.",
        f"- Held-out gap in loss at a training loss of {TARGET:g}: {extremes(raw)}.",
        _noise(raw),
    ]


def _holding(raw: Raw, study: str) -> str:
    """Which rules hold at each size."""
    found = cells(raw, study)
    reference = found[None, REFERENCE_SIZE]
    said, last = [], 0
    for number, size in enumerate(SIZES):
        rules = [
            f"*{rule}*"
            for rule in RULES[STUDIES[study][0]]
            if distance(found[rule, size], reference) <= TOLERANCE
        ]
        said.append(f"at {size:,} {_listed(rules) or 'none'}")
        last = number + 1 if rules else last
    if not last:
        return "no rule holds at any size"
    above = ["above that none"] if last < len(SIZES) else []
    return f"there hold {'; '.join([*said[:last], *above])}"


def _listed(names: Sequence[str]) -> str:
    """With commas, and with "and" before the last."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _lowest(raw: Raw, size: int) -> str:
    arms = arms_at(raw, size)
    return f"at {size:,} the lowest training loss is that of *{arms[0]}*, the highest *{arms[-1]}*"


def _noise(raw: Raw) -> str:
    agree = "agree" if misses(raw) <= MISSES_OF_THIRTY else "do not agree"
    ratio = fitted(measured_points(raw)).b_crit / predicted_scale(raw)
    return (
        f"- Noise scale: ledger, two batches and brute force {agree}; B_crit of the measured "
        f"steps is {ratio:.2f} of it."
    )
