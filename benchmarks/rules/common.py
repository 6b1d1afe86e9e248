"""What the parts of benchmarks/scaling_rules.py share: data, network, recipes, and a run looked at.

Fashion-MNIST, all 60,000 training images and the 10,000 of the official test set, as vectors of 784
with one mean and one deviation taken out; 784-64-10 with ReLU, float32, mean cross-entropy. Where
its files are missing, digits: 1,438 and 359 images as vectors of 64, and 64-128-10.
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
from rules.data import DATA, by_data, loaded

__all__ = [
    "ADAMW_DECAY",
    "EPOCHS",
    "FULL",
    "HIDDEN",
    "JUDGED_ON",
    "OBJECTIVE",
    "REFERENCE_SIZE",
    "SEEDS",
    "curve",
    "examples",
    "growing",
    "look",
    "network",
    "plain_sgd",
    "reference",
    "rounded",
    "updates",
    "warmed_up",
]

SEEDS = (0, 1, 2, 3, 4)
FULL = DATA.full  # examples of the training set
REFERENCE_SIZE, EPOCHS = 32, 10
MOMENTUM, ADAMW_DECAY = 0.9, 0.3
HIDDEN = by_data({"fashion_mnist": 64, "digits": 128})
JUDGED_ON = min(FULL, 20_000)  # training images, always the same
OBJECTIVE = ab.Objective(cross_entropy)


@cache
def examples(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 784] and classes [N] of "train" or "test", in memory."""
    images, classes = loaded(part)
    return ((images.flatten(1) - DATA.mean) / DATA.deviation).contiguous(), classes


def network(seed: int) -> nn.Module:
    """784-64-10 (digits: 64-128-10), from the weights of a seed."""
    torch.manual_seed(seed)
    return mlp(inputs=[DATA.inputs], hidden=[HIDDEN])


def plain_sgd(model: nn.Module, size: int, lr: float, seed: int, epochs: int) -> Iterator[ab.Step]:
    """Updates without momentum, at one rate; a last batch too small goes with the next epoch."""
    return ab.steps(
        model,
        OBJECTIVE,
        torch.optim.SGD(model.parameters(), lr=lr),
        examples("train"),
        order=ab.Order(FULL, batch_size=size, seed=seed, last="carry"),
        epochs=epochs,
    )


def reference(optimizer: str, lr: float) -> Recipe:
    """What is carried: a recipe for batches of 32.

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


def warmed_up(recipe: Recipe) -> Schedule:
    """The rate of a recipe: constant after its warm-up."""
    lr, stated = recipe.optimizer.lr, recipe.schedule
    if not stated.warm_up:
        return ab.Constant(lr)
    return ab.WarmUp(ab.Constant(lr), stated.warm_up, stated.warm_up_start)


def updates(recipe: Recipe, seed: int, schedule: Schedule) -> Iterator[tuple[nn.Module, ab.Step]]:
    """The model and each update of a run, which ends where it diverges."""
    model = network(seed)
    with suppress(DivergenceError):
        for step in ab.steps(
            model,
            OBJECTIVE,
            build_optimizer(recipe.optimizer, model, allow_code=False),
            examples("train"),
            order=ab.Order(FULL, batch_size=recipe.batch.size, seed=seed),
            epochs=recipe.run.epochs,
            schedule=schedule,
        ):
            yield model, step


def curve(recipe: Recipe, seed: int, schedule: Schedule | None = None) -> dict[str, Any]:
    """A run, looked at after each epoch; fewer than all where it diverged.

    Returns:
        train_loss, test_loss, train_error, test_error by epoch, and the norm of all weights at
        the end.
    """
    found: dict[str, Any] = {
        f"{part}_{what}": [] for what in ("loss", "error") for part in ("train", "test")
    }
    for model, step in updates(recipe, seed, schedule or warmed_up(recipe)):
        if step.ends_epoch:
            looked = look(model)
            if not all(map(math.isfinite, looked.values())):
                break
            for name, value in looked.items():
                found[name].append(value)
            found["weight_norm"] = rounded(norm(model))
    return found


def look(model: nn.Module) -> dict[str, float]:
    """Loss and error over the first `JUDGED_ON` of "train" and over "test"."""
    found = {}
    for part in ("train", "test"):
        data = tuple(column[:JUDGED_ON] for column in examples(part))
        looked = ab.evaluate(model, OBJECTIVE, data, micro_batch=500)
        found[f"{part}_loss"] = rounded(looked.loss)
        found[f"{part}_error"] = rounded(1 - looked.metrics["accuracy"])
    return found


def norm(model: nn.Module) -> float:
    """|w| over all parameters."""
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


def growing(last: int, factor: float) -> Sequence[int]:
    """Numbers of updates at which to look: 1, 2, 3, ..., each about `factor` times the last."""
    found = [1]
    while found[-1] < last:
        found.append(max(found[-1] + 1, round(found[-1] * factor)))
    return found


def rounded(value: float) -> float:
    """Five figures are enough in a raw file."""
    return float(f"{value:.5g}")
