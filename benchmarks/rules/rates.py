"""Reference rates, tuned at a batch of 32 on a seed that only tuning uses.

The best rate has the lowest mean training loss over the last three epochs.
"""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from rules.common import build_reference, train_curve
from rules.data import by_data

__all__ = ["GRIDS", "SEED", "list_jobs", "mean_last_losses", "reference_rate", "run_job"]

SEED, LAST = 100, 3
GRIDS: dict[str, tuple[float, ...]] = by_data(
    {
        "fashion_mnist": {
            "sgd": (0.00125, 0.0025, 0.005, 0.01, 0.02),
            "adamw": (0.0000625, 0.000125, 0.00025, 0.0005, 0.001),
        },
        "digits": {
            "sgd": (0.01, 0.02, 0.04, 0.08, 0.16, 0.32),
            "adamw": (0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
        },
    }
)


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List one training for each rate."""
    return [{"optimizer": name, "lr": lr} for name, rates in GRIDS.items() for lr in rates]


def run_job(optimizer: str, lr: float) -> dict[str, Any]:
    """Train at this rate."""
    return train_curve(build_reference(optimizer, lr), SEED)


def reference_rate(raw: Mapping[str, Any], optimizer: str) -> float:
    """Return the best rate of the raw result."""
    runs = [r for r in raw["rates"]["runs"] if r["optimizer"] == optimizer]
    return float(min(runs, key=mean_last_losses)["lr"])


def mean_last_losses(run: Mapping[str, Any]) -> float:
    """Return the mean training loss over the last epochs."""
    return float(mean(run["train_loss"][-LAST:]))
