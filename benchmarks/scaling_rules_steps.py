"""Steps to a target loss against the batch size, the rate tuned at each.

Plain SGD at a constant rate. A run ends at the first look at which the training loss, over the
same 5,000 examples each time (all, where there are fewer), is at most the target, or without it
after 12 epochs (200 of digits) or 60,000 updates. Looks are 4 % more updates apart; the number of
updates is taken between the last two, where ln loss over ln updates meets the target.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from statistics import mean
from typing import Any

from torch import nn

import anybatch as ab
from anybatch.errors import DivergenceError
from scaling_rules_common import (
    FULL,
    OBJECTIVE,
    SEEDS,
    examples,
    growing,
    look,
    network,
    plain_sgd,
    rounded,
)
from scaling_rules_data import by_data, fitting

__all__ = [
    "ASKED",
    "GRIDS",
    "LOOKED_AT",
    "SIZES",
    "TARGET",
    "jobs",
    "run",
    "steps_at",
    "to_target",
    "tuned_rate",
]

TARGET = by_data({"fashion_mnist": 0.4, "digits": 0.1})  # training loss
NUM_SEEDS, LOOKED_AT, APART = 3, min(5000, FULL), 1.04
MAX_EPOCHS, MAX_UPDATES = by_data({"fashion_mnist": 12, "digits": 200}), 60_000
ASKED = (1, 8, 32, 128, 512, 2048)
FIRST = by_data({"fashion_mnist": (-11, -8, -7, -6, -5, -5), "digits": (-9, -6, -5, -4, -4)})
GRIDS = {  # B: rates, each twice the last
    size: tuple(2.0**power for power in range(first, first + 6))
    for size, first in zip(fitting(ASKED), FIRST, strict=True)
}
SIZES = tuple(GRIDS)


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each rate of each size over the seeds."""
    return [
        {"size": size, "lr": lr, "seed": seed}
        for size, rates in GRIDS.items()
        for lr in rates
        for seed in SEEDS[:NUM_SEEDS]
    ]


def run(size: int, lr: float, seed: int) -> dict[str, Any]:
    """Updates to the target and the losses there; None where it is not reached."""
    reached = to_target(size, lr, seed, MAX_EPOCHS)
    if reached is None:
        return {"updates": None}
    model, needed = reached
    losses = {part: look(model, part).loss for part in ("train", "test")}
    found = {f"{part}_loss": rounded(loss) for part, loss in losses.items()}
    return {"updates": rounded(needed), **found}


def to_target(size: int, lr: float, seed: int, epochs: int) -> tuple[nn.Module, float] | None:
    """The model where it reaches the target, and after how many updates."""
    model = network(seed)
    part = tuple(column[:LOOKED_AT] for column in examples("train"))
    looks = set(growing(MAX_UPDATES, APART))
    before = (0, math.inf)
    with suppress(DivergenceError):
        for step in plain_sgd(model, size, lr, seed, epochs):
            made = step.step + 1
            if made >= MAX_UPDATES:
                break
            if made not in looks:
                continue
            loss = ab.evaluate(model, OBJECTIVE, part, micro_batch=LOOKED_AT).loss
            if loss <= TARGET:
                return model, _crossing(before, (made, loss))
            before = (made, loss)
    return None


def _crossing(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Where the line from one look to the next meets the target, both axes logarithmic."""
    (n, loss), (m, lower) = before, after
    if not math.isfinite(loss):
        return m
    share = math.log(loss / TARGET) / math.log(loss / lower)
    return math.exp(math.log(n) + share * math.log(m / n))


def steps_at(raw: Mapping[str, Any], size: int, lr: float) -> float:
    """Updates to the target in the mean over seeds; without end where one did not reach it."""
    runs = [r for r in raw["steps"]["runs"] if (r["size"], r["lr"]) == (size, lr)]
    needed = [r["updates"] for r in runs]
    return math.inf if None in needed else mean(needed)


def tuned_rate(raw: Mapping[str, Any], size: int) -> float:
    """The rate at which the target is reached in the fewest updates."""
    return min(GRIDS[size], key=lambda lr: steps_at(raw, size, lr))
