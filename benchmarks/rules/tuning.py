"""The rate of plain SGD at each batch size, tuned on a seed that only tuning uses.

The best is the one at which the target is reached in the fewest updates.
"""

import math
from collections.abc import Mapping
from typing import Any

from rules.data import by_data, fitting
from rules.rates import SEED
from rules.target import there

__all__ = ["ASKED", "GRIDS", "SIZES", "jobs", "run", "tuned_rate"]

ASKED = (1, 8, 32, 128, 512, 2048)
FIRST = by_data({"fashion_mnist": (-11, -9, -7, -6, -5, -5), "digits": (-9, -6, -4, -4, -4)})
GRIDS = {  # B: rates, each twice the last
    size: tuple(2.0**power for power in range(first, first + 6))
    for size, first in zip(fitting(ASKED), FIRST, strict=True)
}
SIZES = tuple(GRIDS)


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run for each rate of each size."""
    return [{"size": size, "lr": lr} for size, rates in GRIDS.items() for lr in rates]


def run(size: int, lr: float) -> dict[str, Any]:
    """Train at that rate to the target."""
    return there(size, lr, SEED)


def tuned_rate(raw: Mapping[str, Any], size: int) -> float:
    """The best rate of the raw result."""
    own = [run for run in raw["tuning"]["runs"] if run["size"] == size]
    return float(min(own, key=lambda run: run["updates"] or math.inf)["lr"])
