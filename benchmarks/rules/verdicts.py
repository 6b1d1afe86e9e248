"""Criteria for "holds", "matches" and "agrees", fixed before the runs.

A rule is judged by its training loss at equal numbers of examples. With L(e) the loss after
epoch e over the first 20,000 images (all, where there are fewer), averaged over seeds, and E epochs
in all,

    distance = mean over e = 2 .. E of |ln L(e) - ln L_32(e)|

The first epoch is left out. The distance between two groups of seeds of the reference shows
what the criterion can resolve.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rules.common import EPOCHS
from rules.data import by_data

__all__ = [
    "FIT_TOLERANCE",
    "GAP_AT",
    "MISSES_OF_THIRTY",
    "NORM_TOLERANCE",
    "TOLERANCE",
    "distance",
    "final_loss",
    "interpolate_gap",
    "mean_curve",
    "sum_minutes",
]

Runs = Sequence[Mapping[str, Any]]

TOLERANCE = 0.10  # largest distance of a rule that holds, and of ln L of a warm-up that matches
GAP_AT = by_data(  # training loss at which the held-out gap is measured
    {
        "fashion_mnist": {"sgd": 0.30, "adamw": 0.35},
        "digits": {"sgd": 0.05, "adamw": 0.05},
    }
)
MISSES_OF_THIRTY = 4  # of 95 % intervals: 5 or more of 30 have a probability of 2 %
FIT_TOLERANCE = 0.20  # of |ln steps|: the resolution of a grid of rates with factors of 2
NORM_TOLERANCE = 0.10  # of the growth of |w| between batch sizes


def sum_minutes(raw: Mapping[str, Any]) -> tuple[float, float]:
    """Return CPU and wall minutes of all parts of a raw result."""
    parts = [value for value in raw.values() if "cpu_seconds" in value]
    cpu, wall = (sum(part[key] for part in parts) for key in ("cpu_seconds", "wall_seconds"))
    return cpu / 60, wall / 60


def mean_curve(runs: Runs) -> list[float]:
    """Return L(e), e = 1 .. E; infinity once a training has diverged."""
    curves = [[*run["train_loss"], *[math.inf] * EPOCHS][:EPOCHS] for run in runs]
    return [mean(losses) for losses in zip(*curves, strict=True)]


def final_loss(runs: Runs) -> float:
    """Return the mean training loss after the last epoch."""
    return mean_curve(runs)[-1]


def distance(runs: Runs, reference: Runs) -> float:
    """Return the distance from the reference."""
    pairs = zip(mean_curve(runs)[1:], mean_curve(reference)[1:], strict=True)
    return float(mean(abs(math.log(loss / expected)) for loss, expected in pairs))


def interpolate_gap(run: Mapping[str, Any], at: float) -> dict[str, float] | None:
    """Return test minus training, of loss and error, where the training loss first reaches `at`.

    Between two epochs both are linear in ln of the training loss.

    Returns:
        None where the loss does not reach it, or reaches it in the first epoch.
    """
    losses = run["train_loss"]
    after = next((epoch for epoch, loss in enumerate(losses) if loss <= at), 0)
    if not after:
        return None
    before = after - 1
    share = math.log(losses[before] / at) / math.log(losses[before] / losses[after])

    def interpolate(what: str) -> float:
        gaps: list[float] = [
            run[f"test_{what}"][e] - run[f"train_{what}"][e] for e in (before, after)
        ]
        return gaps[0] + share * (gaps[1] - gaps[0])

    return {"loss": interpolate("loss"), "error": interpolate("error")}
