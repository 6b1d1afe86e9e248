"""Mean against Max on the same images: the losses that each leaves.

There are 5,000 images, or all where there are fewer. A linear model cannot fit 5,000 images of
Fashion-MNIST (it can fit the digits); the network can. Each reduction has the rate of its grid with
the lowest value of this reduction over the images, in the mean over seeds.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch

import anybatch as ab
from anybatch.errors import DivergenceError
from anybatch.zoo import cross_entropy, softmax_regression
from rules.common import FULL, MOMENTUM, SEEDS, build_network, load_examples, round_figures
from rules.data import DATA, by_data

__all__ = ["GRIDS", "MODELS", "NUM_IMAGES", "NUM_UPDATES", "SIZE", "list_jobs", "run_job"]

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


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List each reduction at each of its rates, on both models."""
    return [
        {"model": model, "reduction": reduction, "lr": lr, "seed": seed}
        for model, reduction in product(MODELS, GRIDS)
        for lr in GRIDS[reduction]
        for seed in SEEDS
    ]


def run_job(model: str, reduction: str, lr: float, seed: int) -> dict[str, Any]:
    """Train, and return mean loss, worst loss and error on both splits; None if it diverged."""
    data = tuple(column[:NUM_IMAGES] for column in load_examples("train"))
    torch.manual_seed(seed)
    network = build_network(seed) if model == "network" else softmax_regression([DATA.inputs])
    with suppress(DivergenceError):
        for step in ab.steps(
            network,
            ab.Objective(cross_entropy, reduction=REDUCTIONS[reduction]),
            torch.optim.SGD(network.parameters(), lr=lr, momentum=MOMENTUM),
            data,
            order=ab.Order(NUM_IMAGES, batch_size=SIZE, seed=seed, last="carry"),
            epochs=NUM_UPDATES * SIZE // NUM_IMAGES + 1,
        ):
            if step.step + 1 == NUM_UPDATES:
                return {
                    "train": _measure_losses(network, data),
                    "test": _measure_losses(network, load_examples("test")),
                }
    return {"train": None, "test": None}


def _measure_losses(model: torch.nn.Module, data: Any) -> dict[str, float]:
    """Return the value of each reduction, and the error, from one pass over the images."""
    objective = ab.Objective(repeat_losses, reduction=REDUCTIONS)
    result = ab.evaluate(model, objective, data, micro_batch=2000)
    losses = {name: round_figures(value) for name, value in result.parts.items()}
    return {**losses, "error": round_figures(1 - result.metrics["mean.accuracy"])}


def repeat_losses(model: torch.nn.Module, batch: Any) -> dict[str, ab.ExampleLosses]:
    """Return the same losses under the name of each reduction."""
    return dict.fromkeys(REDUCTIONS, cross_entropy(model, batch))
