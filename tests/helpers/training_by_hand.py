"""A small float64 training, by `steps` and as a loop written out in plain torch: the oracle.

`by_hand` uses `order.indices` and torch alone: mean loss of the whole batch, backward, optimiser.
"""

import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

N = 23
ORDER = ab.Order(N, batch_size=8, seed=4)


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 7, dtype=torch.float64),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(7, 3, dtype=torch.float64),
    )


def data():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :3].argmax(1)


def example_losses(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


OBJECTIVE = ab.Objective(example_losses)


def groups(model, factor=2):
    """Biases at a multiple of the rate."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "bias" not in name]},
        {"params": [p for name, p in named if "bias" in name], "lr": 0.1 * factor},
    ]


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def distance(left, right):
    return ((left - right).norm() / right.norm()).item()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def by_hand(make, schedule=None, accumulates=False, order=range(12)):
    """Train these steps in a plain loop, and return the weights."""
    model = network()
    optimizer = make(model)
    inputs, targets = data()
    examples = 0
    for step in order:
        ids = ORDER.indices(step)
        if schedule is not None:
            for group, factor in zip(optimizer.param_groups, (1, 2), strict=True):
                group["lr"] = schedule(examples) * factor
        if not accumulates:
            optimizer.zero_grad()
        F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
        optimizer.step()
        examples += len(ids)
    return weights(model)


def run(model, optimizer, *, epochs=4, body=lambda step: None, **options):
    """`steps` to their end; returns the weights."""
    options = {"objective": OBJECTIVE, "data": data(), "order": ORDER} | options
    objective, examples = options.pop("objective"), options.pop("data")
    for step in ab.steps(model, objective, optimizer, examples, epochs=epochs, **options):
        body(step)
    return weights(model)
