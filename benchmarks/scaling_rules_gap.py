"""The held-out gap at one training loss, for each batch size at a rate of its own.

Plain SGD at the rate that part `steps` tuned for the next smaller size, to the target of `steps`.
"""

from collections.abc import Mapping
from typing import Any

from scaling_rules_common import FULL, REFERENCE_SIZE, SEEDS, look, rounded
from scaling_rules_data import fitting
from scaling_rules_steps import NUM_SEEDS, to_target, tuned_rate
from scaling_rules_steps import SIZES as TUNED

__all__ = ["ASKED", "SIZES", "jobs", "run"]

ASKED, MAX_EPOCHS = (REFERENCE_SIZE, 256, 1024, 4096), 600
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
    reached = to_target(size, lr, seed, MAX_EPOCHS)
    if reached is None:
        return {"updates": None}
    found: dict[str, Any] = {"updates": rounded(reached[1])}
    for part in ("train", "test"):
        looked = look(reached[0], part)
        found[f"{part}_loss"] = rounded(looked.loss)
        found[f"{part}_error"] = rounded(1 - looked.metrics["accuracy"])
    return found
