"""Goyal's comparison in small: a large batch under three warm-ups, and with the wrong rates.

The rate is divided by 10 after 5 and 8 of 10 epochs; a warm-up takes the first of them, a tenth,
where 5 of 90 epochs were an eighteenth.
"""

from collections.abc import Mapping
from typing import Any

import anybatch as ab
from anybatch.recipe.scaling import rules
from anybatch.schedules import Schedule
from rules.common import FULL, REFERENCE_SIZE, SEEDS, curve, reference
from rules.data import fitting
from rules.rates import tuned

__all__ = ["ARMS", "ASKED", "SIZES", "jobs", "run"]

ASKED = (1024, 4096)
SIZES = fitting(ASKED)
DROPS = (5 * FULL, 8 * FULL)  # examples
ARMS = ("gradual", "constant", "no warm-up", "square root", "unscaled")


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference, and each way to train a large batch."""
    lr = tuned(raw, "sgd")
    cells = [("reference", REFERENCE_SIZE), *((arm, size) for size in SIZES for arm in ARMS)]
    return [
        {"arm": arm, "size": size, "lr": lr, "seed": seed} for arm, size in cells for seed in SEEDS
    ]


def run(arm: str, size: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one of them."""
    recipe = reference("sgd", lr)
    batch = recipe.batch.model_copy(update={"size": size})
    schedule = schedule_of(arm, lr, size / REFERENCE_SIZE)
    return curve(recipe.model_copy(update={"batch": batch}), seed, schedule)


def schedule_of(arm: str, lr: float, k: float) -> Schedule:
    """The learning rate over the examples."""
    large = {"square root": rules.square_root(lr, k), "unscaled": lr, "reference": lr}
    whole = ab.StepDecay(large.get(arm, rules.linear(lr, k)), factor=0.1, at=DROPS)
    if arm == "gradual":
        return ab.WarmUp(whole, FULL, start=lr)
    if arm == "constant":
        return lambda done: lr if done < FULL else whole(done)
    return whole
