"""Goyal's comparison in small: a large batch under three warm-ups, and with two wrong rates.

The rate is divided by 10 after 5 and 8 of 10 epochs. A warm-up takes the first epoch, a tenth of
training; in the original it took 5 of 90 epochs, an eighteenth.
"""

from collections.abc import Mapping
from typing import Any

import anybatch as ab
from anybatch.recipe.scaling import rules
from anybatch.schedules import Schedule
from rules.common import FULL, REFERENCE_SIZE, SEEDS, build_reference, train_curve
from rules.data import keep_smaller
from rules.rates import reference_rate

__all__ = ["ARMS", "SIZES", "list_jobs", "run_job"]

SIZES = keep_smaller((1024, 4096))
DROPS = (5 * FULL, 8 * FULL)  # examples
ARMS = ("gradual", "constant", "no warm-up", "square root", "unscaled")


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the reference, and each way to train a large batch."""
    lr = reference_rate(raw, "sgd")
    cells = [("reference", REFERENCE_SIZE), *((arm, size) for size in SIZES for arm in ARMS)]
    return [
        {"arm": arm, "size": size, "lr": lr, "seed": seed} for arm, size in cells for seed in SEEDS
    ]


def run_job(arm: str, size: int, lr: float, seed: int) -> dict[str, Any]:
    """Train in one of these ways."""
    recipe = build_reference("sgd", lr)
    batch = recipe.batch.model_copy(update={"size": size})
    schedule = build_schedule(arm, lr, size / REFERENCE_SIZE)
    return train_curve(recipe.model_copy(update={"batch": batch}), seed, schedule)


def build_schedule(arm: str, lr: float, k: float) -> Schedule:
    """Return the learning rate as a function of the examples."""
    large = {"square root": rules.square_root(lr, k), "unscaled": lr, "reference": lr}
    whole = ab.StepDecay(large.get(arm, rules.linear(lr, k)), factor=0.1, at=DROPS)
    if arm == "gradual":
        return ab.WarmUp(whole, FULL, start=lr)
    if arm == "constant":
        return lambda done: lr if done < FULL else whole(done)
    return whole
