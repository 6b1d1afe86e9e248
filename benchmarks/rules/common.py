"""Data, network, recipes and measurements that all parts of benchmarks/scaling_rules.py use.

The data are Fashion-MNIST: 60,000 training images and the 10,000 of the official test set, as
vectors of 784, normalised by one mean and one deviation. The network is 784-64-10 with ReLU, in
float32, under mean cross-entropy. Where the files are missing, the data are digits: 1,438 and 359
images as vectors of 64, and the network is 64-128-10.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import DivergenceError
from anybatch.recipe.files import parse_recipe
from anybatch.recipe.optimizers import build_optimizer
from anybatch.recipe.schema import Recipe
from anybatch.schedules import Schedule
from anybatch.zoo import cross_entropy, mlp
from rules.data import DATA, by_data, load_images

__all__ = [
    "ADAMW_DECAY",
    "EPOCHS",
    "FULL",
    "HIDDEN",
    "JUDGED_ON",
    "OBJECTIVE",
    "REFERENCE_SIZE",
    "SEEDS",
    "build_network",
    "build_reference",
    "load_examples",
    "measure",
    "read_schedule",
    "round_figures",
    "run_sgd",
    "run_updates",
    "space_looks",
    "train_curve",
]

SEEDS = (0, 1, 2, 3, 4)
FULL = DATA.full  # examples of the training set
REFERENCE_SIZE, EPOCHS = 32, 10
MOMENTUM, ADAMW_DECAY = 0.9, 0.3
HIDDEN = by_data({"fashion_mnist": 64, "digits": 128})
JUDGED_ON = min(FULL, 20_000)  # training images, always the same
OBJECTIVE = ab.Objective(cross_entropy)


@cache
def load_examples(part: str) -> tuple[Tensor, Tensor]:
    """Return images [N, 784] and classes [N] of "train" or "test"."""
    images, classes = load_images(part)
    return ((images.flatten(1) - DATA.mean) / DATA.deviation).contiguous(), classes


def build_network(seed: int) -> nn.Module:
    """Build 784-64-10 (digits: 64-128-10) with the initial weights of a seed."""
    torch.manual_seed(seed)
    return mlp(inputs=[DATA.inputs], hidden=[HIDDEN])


def run_sgd(model: nn.Module, size: int, lr: float, seed: int, epochs: int) -> Iterator[ab.Step]:
    """Train without momentum at one rate; a short last batch is completed by the next epoch."""
    return ab.steps(
        model,
        OBJECTIVE,
        torch.optim.SGD(model.parameters(), lr=lr),
        load_examples("train"),
        order=ab.Order(FULL, batch_size=size, seed=seed, last="carry"),
        epochs=epochs,
    )


def build_reference(optimizer: str, lr: float) -> Recipe:
    """Build the recipe for batches of 32 that the rules convert.

    The rate of SGD rises from the reference rate over the first epoch, which is a constant at
    the reference size, and Goyal's gradual warm-up at any larger one.
    """
    args = {"sgd": {"momentum": MOMENTUM}, "adamw": {"weight_decay": ADAMW_DECAY}}[optimizer]
    warm_up = {"warm_up": FULL, "warm_up_start": lr} if optimizer == "sgd" else {}
    tree = {
        "model": {"name": "mlp", "args": {"inputs": [DATA.inputs], "hidden": [HIDDEN]}},
        "data": {"name": DATA.name, "held_out": DATA.held_out},
        "objective": {"loss": "cross_entropy"},
        "optimizer": {"name": optimizer, "lr": lr, "args": args},
        "schedule": warm_up,
        "batch": {"size": REFERENCE_SIZE},
        "run": {"epochs": EPOCHS},
    }
    return parse_recipe(tree, "the reference")


def read_schedule(recipe: Recipe) -> Schedule:
    """Return the rate of a recipe: constant after its warm-up."""
    constant, keys = ab.Constant(recipe.optimizer.lr), recipe.schedule
    return ab.WarmUp(constant, keys.warm_up, keys.warm_up_start) if keys.warm_up else constant


def run_updates(
    recipe: Recipe, seed: int, schedule: Schedule
) -> Iterator[tuple[nn.Module, ab.Step]]:
    """Train, and yield the model and each update, until the end or until it diverges."""
    model = build_network(seed)
    with suppress(DivergenceError):
        for step in ab.steps(
            model,
            OBJECTIVE,
            build_optimizer(recipe.optimizer, model, allow_code=False),
            load_examples("train"),
            order=ab.Order(FULL, batch_size=recipe.batch.size, seed=seed),
            epochs=recipe.run.epochs,
            schedule=schedule,
        ):
            yield model, step


def train_curve(recipe: Recipe, seed: int, schedule: Schedule | None = None) -> dict[str, Any]:
    """Train, and measure after each epoch until the end or until it diverges.

    Returns:
        train_loss, test_loss, train_error, test_error by epoch, and the norm of all weights at
        the end.
    """
    curves: dict[str, Any] = {
        f"{part}_{what}": [] for what in ("loss", "error") for part in ("train", "test")
    }
    for model, step in run_updates(recipe, seed, schedule or read_schedule(recipe)):
        if step.ends_epoch:
            values = measure(model)
            if not all(map(math.isfinite, values.values())):
                break
            for name, value in values.items():
                curves[name].append(value)
            curves["weight_norm"] = round_figures(weight_norm(model))
    return curves


def measure(model: nn.Module) -> dict[str, float]:
    """Return loss and error over the first `JUDGED_ON` of "train" and over "test"."""
    values = {}
    for part in ("train", "test"):
        data = tuple(column[:JUDGED_ON] for column in load_examples(part))
        result = ab.evaluate(model, OBJECTIVE, data, micro_batch=500)
        values[f"{part}_loss"] = round_figures(result.loss)
        values[f"{part}_error"] = round_figures(1 - result.metrics["accuracy"])
    return values


def weight_norm(model: nn.Module) -> float:
    """Return |w| over all parameters."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


def space_looks(last: int, factor: float) -> Sequence[int]:
    """Return numbers of updates 1, 2, 3, ..., each about `factor` times the last."""
    looks = [1]
    while looks[-1] < last:
        looks.append(max(looks[-1] + 1, round(looks[-1] * factor)))
    return looks


def round_figures(value: float) -> float:
    """Round to the five figures of a raw file."""
    return float(f"{value:.5g}")
