"""A training on ranks whose body draws from global generators; see test_training_draws.py."""

import logging
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch import distributed
from anybatch.errors import RunError


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def draw(kinds):
    """Draw a number from each of these generators."""
    draws = []
    if "torch" in kinds:
        draws.append(float(torch.rand(())))
    if "numpy" in kinds:
        draws.append(float(np.random.random()))  # noqa: NPY002
    if "random" in kinds:
        draws.append(random.random())
    return draws


def train(group, folder, epochs, *, seeds, kinds, moves=False, bitwise=False):
    """Train; returns the weights and what the body has drawn, and what was logged.

    Args:
        seeds: of torch, NumPy and `random`.
        moves: whether the weights depend on the draws.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float32)
    for seed, one in zip((torch.manual_seed, np.random.seed, random.seed), seeds, strict=True):
        seed(one)
    results = []
    handler = logging.Handler()
    handler.emit = lambda record: results.append(record.getMessage())
    logging.getLogger("anybatch").addHandler(handler)
    draws = []
    try:
        for _ in ab.steps(
            model,
            ab.Objective(losses, grain=2),
            torch.optim.SGD(model.parameters(), lr=0.1),
            data(),
            order=ab.Order(12, batch_size=4, seed=0),
            epochs=epochs,
            run=folder,
            group=group,
            bitwise=bitwise,
        ):
            draws += draw(kinds)
            if moves:
                with torch.no_grad():
                    model.weight.add_(0.01 * torch.randn(3, 4))
    except RunError as error:
        results.append(f"refused: {error}")
    finally:
        logging.getLogger("anybatch").removeHandler(handler)
    return model.weight.detach().tolist(), draws, results


def work(folder, group):
    """Run, on two ranks, the trainings that the tests look at."""
    rank = distributed.get_rank(group)
    every, here = ("torch", "numpy", "random"), [rank] * 3
    alike = {"seeds": (1, 1, 1), "kinds": every, "moves": True}
    result = {
        "whole": train(group, folder / "whole", 3, **alike),
        "half": train(group, folder / "resumed", 2, **alike),
        "resumed": train(group, folder / "resumed", 3, **alike | {"seeds": (2, 2, 2)}),
        "undrawn": train(group, folder / "undrawn", 1, seeds=here, kinds=()),
        "own": train(group, folder / "own", 1, seeds=here, kinds=("torch", "random")),
        "own, bitwise": train(group, folder / "b", 1, seeds=here, kinds=("numpy",), bitwise=True),
        "partly": train(group, folder / "partly", 1, seeds=(1, rank, rank), kinds=("torch",)),
    }
    result["total"] = weighted(group, rank)
    return result


def weighted(group, rank):
    """Compute a gradient under Mean with a total, of 5 examples on one rank and 3 on the other."""
    torch.manual_seed(0)
    model, weights = nn.Linear(4, 3).double(), torch.arange(8.0, dtype=torch.float64)
    share = slice(0, 5) if rank == 0 else slice(5, 8)

    def weighted_losses(model, batch):
        return ab.ExampleLosses(batch[2] * losses(model, batch), counts=batch[2])

    inputs, targets = data()
    batch = (inputs[:8].double()[share], targets[:8][share], weights[share])
    objective = ab.Objective(weighted_losses, 0.5 * ab.Mean(total=2.0))
    gradient = ab.batch_gradient(model, objective, batch, group=group)
    return float(gradient.loss), model.weight.grad.tolist()
