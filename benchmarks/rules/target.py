"""A run of plain SGD to a target loss, which parts `tuning`, `steps` and `gap` share.

A run ends at the first look at which the training loss, over the same 5,000 examples each time
(all, where there are fewer), is at most the target, or without it after so many epochs or 40,000
updates. Looks are 4 % more updates apart; the number of updates is taken between the last two,
where ln loss over ln updates meets the target.
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
    examples,
    growing,
    look,
    network,
    plain_sgd,
    rounded,
)
from rules.data import by_data

__all__ = ["LOOKED_AT", "MAX_EPOCHS", "MAX_UPDATES", "TARGET", "there"]

TARGET = by_data({"fashion_mnist": 0.4, "digits": 0.1})  # training loss
LOOKED_AT, APART = min(5000, FULL), 1.04
MAX_EPOCHS, MAX_UPDATES = by_data({"fashion_mnist": 12, "digits": 200}), 40_000


def there(size: int, lr: float, seed: int, epochs: int = MAX_EPOCHS) -> dict[str, Any]:
    """Updates to the target, and loss and error there on both parts; None where it is not
    reached."""
    reached = _to_target(size, lr, seed, epochs)
    if reached is None:
        return {"updates": None}
    model, needed = reached
    return {"updates": rounded(needed), **look(model)}


def _to_target(size: int, lr: float, seed: int, epochs: int) -> tuple[nn.Module, float] | None:
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
