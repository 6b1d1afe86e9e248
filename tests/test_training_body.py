"""What the loop's body changes comes back on a resume: freezing, modes, and draws.

Oracle: the same training in one go. Control: half of it ends elsewhere.
"""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def unfreeze(model, step):
    if step.step == 1:
        model[0].requires_grad_(True)


def freeze(model, step):
    model[0].requires_grad_(step.step < 1)


def evaluate_from_then_on(model, step):
    if step.step == 1:
        model[1].eval()  # dropout ends


def draw_by_torch(model, step):
    with torch.no_grad():
        model[2].weight.add_(0.01 * torch.randn_like(model[2].weight))


def draw_by_numpy(model, step):
    with torch.no_grad():
        model[2].weight.add_(0.01 * float(np.random.standard_normal()))  # noqa: NPY002


def draw_by_random(model, step):
    with torch.no_grad():
        model[2].weight.add_(0.01 * random.gauss(0, 1))


BODIES = [
    unfreeze,
    freeze,
    evaluate_from_then_on,
    draw_by_torch,
    draw_by_numpy,
    draw_by_random,
]


def train(body, epochs, folder, *, seed, bitwise=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 3))
    model[0].requires_grad_(body is not unfreeze)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    steps = ab.steps(
        model,
        ab.Objective(losses, grain=2),
        optimizer,
        data(),
        order=ab.Order(12, batch_size=4, seed=0),
        epochs=epochs,
        run=folder,
        bitwise=bitwise,
    )
    for step in steps:
        body(model, step)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_the_body_changes_comes_back(body, bitwise, tmp_path):
    whole = train(body, 3, tmp_path / "whole", seed=1, bitwise=bitwise)
    half = train(body, 2, tmp_path / "resumed", seed=1, bitwise=bitwise)
    assert not torch.equal(half, whole)  # the control
    resumed = train(body, 3, tmp_path / "resumed", seed=2, bitwise=bitwise)  # other draws before
    assert torch.equal(resumed, whole)
