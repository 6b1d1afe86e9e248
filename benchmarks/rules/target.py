"""Train by plain SGD to a target loss, for parts `tuning`, `steps` and `gap`.

The training loss is measured over the same 5,000 examples each time (all, where there are fewer),
after numbers of updates that grow by 4 %. Training ends once the loss is at most the target, or
fails after so many epochs or 40,000 updates. The number of updates is interpolated between the last
two measurements, linear in ln loss over ln updates.
"""

import math
from contextlib import suppress
from typing import Any

from torch import nn

import anybatch as ab
from anybatch.errors import DivergenceError
from rules.common import (
    FULL,
    OBJECTIVE,
    build_network,
    load_examples,
    measure,
    round_figures,
    run_sgd,
    space_looks,
)
from rules.data import by_data

__all__ = ["LOOKED_AT", "MAX_EPOCHS", "MAX_UPDATES", "TARGET", "run_to_target"]

TARGET = by_data({"fashion_mnist": 0.4, "digits": 0.1})  # training loss
LOOKED_AT, APART = min(5000, FULL), 1.04
MAX_EPOCHS, MAX_UPDATES = by_data({"fashion_mnist": 12, "digits": 200}), 40_000


def run_to_target(size: int, lr: float, seed: int, epochs: int = MAX_EPOCHS) -> dict[str, Any]:
    """Return the updates to the target, and loss and error there on both splits.

    The updates are None where the target is not reached.
    """
    reached = _train_to_target(size, lr, seed, epochs)
    if reached is None:
        return {"updates": None}
    model, needed = reached
    return {"updates": round_figures(needed), **measure(model)}


def _train_to_target(
    size: int, lr: float, seed: int, epochs: int
) -> tuple[nn.Module, float] | None:
    """Return the model at the target and the number of updates; None if it is not reached."""
    model = build_network(seed)
    part = tuple(column[:LOOKED_AT] for column in load_examples("train"))
    looks = set(space_looks(MAX_UPDATES, APART))
    before = (0, math.inf)
    with suppress(DivergenceError):
        for step in run_sgd(model, size, lr, seed, epochs):
            count = step.step + 1
            if count >= MAX_UPDATES:
                break
            if count not in looks:
                continue
            loss = ab.evaluate(model, OBJECTIVE, part, micro_batch=LOOKED_AT).loss
            if loss <= TARGET:
                return model, _interpolate_crossing(before, (count, loss))
            before = (count, loss)
    return None


def _interpolate_crossing(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Return where the line between two measurements meets the target, both axes logarithmic."""
    (n, loss), (m, lower) = before, after
    if not math.isfinite(loss):
        return m
    share = math.log(loss / TARGET) / math.log(loss / lower)
    return math.exp(math.log(n) + share * math.log(m / n))
