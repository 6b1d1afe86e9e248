"""Mean against Max on the same images, 5,000 where there are as many: what loss each leaves.

A linear model, which cannot fit 5,000 images of Fashion-MNIST (it can fit those of digits), and the
network, which can. Each reduction has the rate of its grid that does best by what it minimises,
over these images, in the mean over seeds.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch

import anybatch as ab
from anybatch.errors import DivergenceError
from anybatch.zoo import cross_entropy, softmax_regression
from rules.common import FULL, MOMENTUM, SEEDS, examples, network, rounded
from rules.data import DATA, by_data

__all__ = ["GRIDS", "MODELS", "NUM_IMAGES", "NUM_UPDATES", "SIZE", "jobs", "run"]

NUM_IMAGES, SIZE, NUM_UPDATES = min(5000, FULL), 256, 1500
MODELS = ("linear", "network")
GRIDS: dict[str, tuple[float, ...]] = by_data(
    {
        "fashion_mnist": {
            "mean": (0.005, 0.025, 0.125, 0.625),
            "max": (0.00002, 0.0001, 0.0005, 0.0025),
        },
        "digits": {
            "mean": (0.025, 0.125, 0.625, 3.125),
            "max": (0.0005, 0.0025, 0.0125, 0.0625),
        },
    }
)
REDUCTIONS = {"mean": ab.Mean(), "max": ab.Max()}


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each reduction at each of its rates, on both models."""
    return [
        {"model": model, "reduction": reduction, "lr": lr, "seed": seed}
        for model, reduction in product(MODELS, GRIDS)
        for lr in GRIDS[reduction]
        for seed in SEEDS
    ]


def run(model: str, reduction: str, lr: float, seed: int) -> dict[str, Any]:
    """Mean and worst loss and the error on both parts; None where it diverged."""
    data = tuple(column[:NUM_IMAGES] for column in examples("train"))
    torch.manual_seed(seed)
    made = network(seed) if model == "network" else softmax_regression([DATA.inputs])
    with suppress(DivergenceError):
        for step in ab.steps(
            made,
            ab.Objective(cross_entropy, reduction=REDUCTIONS[reduction]),
            torch.optim.SGD(made.parameters(), lr=lr, momentum=MOMENTUM),
            data,
            order=ab.Order(NUM_IMAGES, batch_size=SIZE, seed=seed, last="carry"),
            epochs=NUM_UPDATES * SIZE // NUM_IMAGES + 1,
        ):
            if step.step + 1 == NUM_UPDATES:
                return {"train": _there(made, data), "test": _there(made, examples("test"))}
    return {"train": None, "test": None}


def _there(model: torch.nn.Module, data: Any) -> dict[str, float]:
    """By each reduction, and the error; the images go through the model once for all."""
    objective = ab.Objective(in_all, reduction=REDUCTIONS)
    found = ab.evaluate(model, objective, data, micro_batch=2000)
    losses = {name: rounded(value) for name, value in found.parts.items()}
    return {**losses, "error": rounded(1 - found.metrics["mean.accuracy"])}


def in_all(model: torch.nn.Module, batch: Any) -> dict[str, ab.ExampleLosses]:
    """The same losses for each reduction."""
    return dict.fromkeys(REDUCTIONS, cross_entropy(model, batch))
