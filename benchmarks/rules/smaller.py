"""Rules for SGD again, from a quarter of the tuned rate, on fewer seeds.

A rate tuned at a small batch is close to the largest stable one, so a multiple of it is unstable.
The linear rule assumes that the gradient hardly changes over the updates that it merges.
"""

from collections.abc import Mapping
from typing import Any

from rules import batches
from rules.batches import AGAIN, run_job
from rules.common import SEEDS

__all__ = ["NUM_SEEDS", "SHARE", "list_jobs", "run_job"]

SHARE, NUM_SEEDS = 0.25, 3  # of the tuned rate; seeds in each group


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the jobs of the tuned rate, at the smaller rate."""
    seeds = {*SEEDS[:NUM_SEEDS], *AGAIN[:NUM_SEEDS]}
    return [
        job | {"lr": job["lr"] * SHARE}
        for job in batches.list_jobs(raw)
        if job["optimizer"] == "sgd" and job["seed"] in seeds
    ]
