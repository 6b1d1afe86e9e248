"""The held-out gap at one training loss, for each batch size at a rate of its own.

Plain SGD at the rate that part `tuning` found for the next smaller size, to the same target.
"""

from collections.abc import Mapping
from typing import Any

from rules.common import FULL, REFERENCE_SIZE, SEEDS
from rules.data import fitting
from rules.target import there
from rules.tuning import SIZES as TUNED
from rules.tuning import tuned_rate

__all__ = ["ASKED", "NUM_SEEDS", "SIZES", "jobs", "run"]

ASKED, MAX_EPOCHS, NUM_SEEDS = (REFERENCE_SIZE, 256, 1024, 4096), 600, 3
SIZES = (*fitting(ASKED), FULL)


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each size over the seeds."""
    rates = {size: tuned_rate(raw, max(s for s in TUNED if s <= size)) for size in SIZES}
    return [
        {"size": size, "lr": lr, "seed": seed}
        for size, lr in rates.items()
        for seed in SEEDS[:NUM_SEEDS]
    ]


def run(size: int, lr: float, seed: int) -> dict[str, Any]:
    """Loss and error there, on both parts; no updates where it is not reached."""
    return there(size, lr, seed, MAX_EPOCHS)
