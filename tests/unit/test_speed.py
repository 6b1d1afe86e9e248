"""Ratios to plain PyTorch that only a twofold slowdown of the library exceeds.

Least times of many steps in turns: other work on the machine only adds time. The limits are about
twice the ratios in docs/performance.md.
"""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

INPUTS, TARGETS = torch.rand(64, 784), torch.arange(64) % 10


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def measure_ratio(step, other, rounds=60):
    """Return the least time of a step over the least time of the other."""
    for _ in range(20):  # the ledger confirms its first 16 updates
        step()
        other()
    least = [float("inf")] * 2
    for _ in range(rounds):
        for i, function in enumerate((step, other)):
            start = time.perf_counter()
            function()
            least[i] = min(least[i], time.perf_counter() - start)
    return least[0] / least[1]


def plain_step():
    model = make_model()

    def step():
        model.zero_grad()
        losses(model, (INPUTS, TARGETS)).mean().backward()

    return step


@pytest.mark.parametrize(
    ("how", "limit"),
    [
        ({}, 3.0),
        ({"layout": ab.Layout(16)}, 8.0),
        ({"observe": ab.Observe()}, 7.0),
    ],
    ids=["uncut", "cut in four", "observed"],
)
def test_a_small_step_is_not_twice_as_slow_as_it_was(how, limit):
    model, objective = make_model(), ab.Objective(losses)
    assert (
        measure_ratio(
            lambda: ab.batch_gradient(model, objective, (INPUTS, TARGETS), **how), plain_step()
        )
        < limit
    )


def test_a_slow_step_would_be_noticed():  # the control
    plain = plain_step()

    def slow():
        plain()
        time.sleep(0.1)

    assert measure_ratio(slow, plain_step(), rounds=5) > 8
