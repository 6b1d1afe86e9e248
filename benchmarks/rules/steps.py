"""Steps to a target loss against the batch size, each at the rate that part `tuning` chose."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from rules.common import SEEDS
from rules.target import run_to_target
from rules.tuning import SIZES, best_rate

__all__ = ["list_jobs", "mean_steps", "run_job"]


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List each size over the seeds."""
    return [
        {"size": size, "lr": best_rate(raw, size), "seed": seed} for size in SIZES for seed in SEEDS
    ]


run_job = run_to_target


def mean_steps(raw: Mapping[str, Any], size: int) -> float:
    """Return the mean updates to the target; infinity where a seed did not reach it."""
    needed = [run["updates"] for run in raw["steps"]["runs"] if run["size"] == size]
    return math.inf if None in needed else mean(needed)
