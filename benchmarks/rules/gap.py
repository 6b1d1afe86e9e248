"""Held-out gap at one training loss, for each batch size at its tuned rate.

Plain SGD trains to the same target at the rate that part `tuning` chose for this size or, failing
that, the next smaller one.
"""

from collections.abc import Mapping
from typing import Any

from rules.common import FULL, REFERENCE_SIZE, SEEDS
from rules.data import keep_smaller
from rules.target import run_to_target
from rules.tuning import SIZES as TUNED
from rules.tuning import best_rate

__all__ = ["NUM_SEEDS", "SIZES", "list_jobs", "run_job"]

MAX_EPOCHS, NUM_SEEDS = 600, 3
SIZES = (*keep_smaller((REFERENCE_SIZE, 256, 1024, 4096)), FULL)


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List each size over the seeds."""
    rates = {size: best_rate(raw, max(s for s in TUNED if s <= size)) for size in SIZES}
    return [
        {"size": size, "lr": lr, "seed": seed}
        for size, lr in rates.items()
        for seed in SEEDS[:NUM_SEEDS]
    ]


def run_job(size: int, lr: float, seed: int) -> dict[str, Any]:
    """Train to the target and measure loss and error there."""
    return run_to_target(size, lr, seed, MAX_EPOCHS)
