"""A small network, its batch, and its gradient by plain PyTorch and by the library."""

import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

LAYOUTS = [None, 6, 5, 1, "auto"]


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


X, Y = data()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(result, right):
    return float((result - right).norm() / right.norm())


def plainly(losses, batch, reduce=torch.mean, make=network):
    model = make()
    values = losses(model, batch)
    model.zero_grad()
    reduce(values).backward()
    return flat(model)


def by_library(losses, batch, reduction=ab.Mean(), *, make=network, **how):  # noqa: B008  frozen
    model = make()
    ab.batch_gradient(model, ab.Objective(losses, reduction), batch, **how)
    return flat(model)
