"""Rate of plain SGD at each batch size, tuned on a seed that only tuning uses.

The best rate reaches the target in the fewest updates.
"""

import math
from collections.abc import Mapping
from typing import Any

from rules.data import by_data, keep_smaller
from rules.rates import SEED
from rules.target import run_to_target

__all__ = ["GRIDS", "SIZES", "best_rate", "list_jobs", "run_job"]

FIRST = by_data({"fashion_mnist": (-11, -9, -7, -6, -5, -5), "digits": (-9, -6, -4, -4, -4)})
GRIDS = {  # B: rates, each twice the last
    size: tuple(2.0**power for power in range(first, first + 6))
    for size, first in zip(keep_smaller((1, 8, 32, 128, 512, 2048)), FIRST, strict=True)
}
SIZES = tuple(GRIDS)


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List one training for each rate of each size."""
    return [{"size": size, "lr": lr} for size, rates in GRIDS.items() for lr in rates]


def run_job(size: int, lr: float) -> dict[str, Any]:
    """Train at this rate to the target."""
    return run_to_target(size, lr, SEED)


def best_rate(raw: Mapping[str, Any], size: int) -> float:
    """Return the best rate of the raw result."""
    runs = [run for run in raw["tuning"]["runs"] if run["size"] == size]
    return float(min(runs, key=lambda run: run["updates"] or math.inf)["lr"])
