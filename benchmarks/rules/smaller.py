"""The rules for SGD again, from a quarter of the tuned rate, on fewer seeds.

A rate tuned at a small batch is near the largest at which training is stable, where a multiple of
it is not: the linear rule supposes that the updates it joins would hardly change the gradient.
"""

from collections.abc import Mapping
from typing import Any

from rules import batches
from rules.batches import AGAIN, run
from rules.common import SEEDS

__all__ = ["NUM_SEEDS", "SHARE", "jobs", "run"]

SHARE, NUM_SEEDS = 0.25, 3  # of the tuned rate; in either group


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the tuned rate, at the smaller one."""
    seeds = {*SEEDS[:NUM_SEEDS], *AGAIN[:NUM_SEEDS]}
    return [
        job | {"lr": job["lr"] * SHARE}
        for job in batches.jobs(raw)
        if job["optimizer"] == "sgd" and job["seed"] in seeds
    ]
