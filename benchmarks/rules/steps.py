"""Steps to a target loss against the batch size, each at the rate that part `tuning` found."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from rules.common import SEEDS
from rules.target import there
from rules.tuning import SIZES, tuned_rate

__all__ = ["jobs", "run", "steps_at"]


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each size over the seeds."""
    return [
        {"size": size, "lr": tuned_rate(raw, size), "seed": seed}
        for size in SIZES
        for seed in SEEDS
    ]


run = there


def steps_at(raw: Mapping[str, Any], size: int) -> float:
    """Updates to the target in the mean over seeds; without end where one did not reach it."""
    needed = [run["updates"] for run in raw["steps"]["runs"] if run["size"] == size]
    return math.inf if None in needed else mean(needed)
