"""Optimisers of the reference.

Oracles: first updates computed by hand; torch.optim in float64 over 50 updates. Each
update rounds a few times at 1e-16, and torch orders the factors otherwise: 1e-12 of the
norm leaves room for 50 of them. Each classic mistake must be off by more than 1e-6.
"""

import numpy as np
import pytest
import torch

from anybatch.reference import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Momentum,
    Nesterov,
    RMSProp,
    elementwise,
    flatten,
)

GENERATOR = np.random.default_rng(0)
START = [
    {"weight": GENERATOR.normal(size=(3, 4)), "bias": GENERATOR.normal(size=3)},
    {},
    {"weight": GENERATOR.normal(size=(2, 3))},
]
CURVATURE = GENERATOR.normal(size=(21, 21)) / 5
PUSHES = GENERATOR.normal(size=(50, 21))


def gradient_at(w, step):
    """Any rule will do that depends on the parameters, so that errors would accumulate."""
    return CURVATURE @ w + PUSHES[step]


def restructure(vector):
    parts = np.split(vector, [12, 15])
    return [
        {"weight": parts[0].reshape(3, 4), "bias": parts[1]},
        {},
        {"weight": parts[2].reshape(2, 3)},
    ]


def path(optimiser):
    """Return the parameters after each of 50 updates."""
    parameters, state, visited = START, optimiser.start(START), []
    for step in range(50):
        gradient = restructure(gradient_at(flatten(parameters), step))
        state, parameters = optimiser.update(state, gradient, parameters)
        visited.append(flatten(parameters))
    return np.array(visited)


def path_in_torch(optimiser, **options):
    w = torch.tensor(flatten(START), requires_grad=True)
    torch_optimiser, visited = optimiser([w], **options), []
    for step in range(50):
        w.grad = torch.tensor(gradient_at(w.detach().numpy(), step))
        torch_optimiser.step()
        visited.append(w.detach().numpy().copy())
    return np.array(visited)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


PAIRS = [
    (SGD(0.1), torch.optim.SGD, {"lr": 0.1}),
    (Momentum(0.05), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (Nesterov(0.05, 0.8), torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    (Adagrad(), torch.optim.Adagrad, {}),
    (Adagrad(0.2, eps=0.1), torch.optim.Adagrad, {"lr": 0.2, "eps": 0.1}),
    (RMSProp(), torch.optim.RMSprop, {}),
    (RMSProp(0.02, 0.8, 0.1), torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 0.1}),
    (Adam(), torch.optim.Adam, {}),
    (Adam(0.05, (0.8, 0.9), 0.1), torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.1}),
    (AdamW(), torch.optim.AdamW, {}),
    (AdamW(0.05, weight_decay=0.3), torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
]


@pytest.mark.parametrize(("optimiser", "torchs", "options"), PAIRS, ids=str)
def test_fifty_updates_follow_torch(optimiser, torchs, options):
    assert distance(path(optimiser), path_in_torch(torchs, **options)) < 1e-12


@pytest.mark.parametrize(
    ("optimiser", "torchs", "options"),
    [
        (Momentum(0.05), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        (Momentum(0.05), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
        (Adagrad(eps=1e-3), torch.optim.Adagrad, {"eps": 1e-10}),
        (RMSProp(), torch.optim.RMSprop, {"centered": True}),
        (Adam(), torch.optim.Adam, {"amsgrad": True, "lr": 2e-3}),
        (AdamW(weight_decay=0.3), torch.optim.Adam, {"weight_decay": 0.3}),
    ],
    ids=["nesterov", "dampened", "epsilon", "centred", "twice the rate", "coupled decay"],
)
def test_the_comparison_with_torch_catches_a_neighbouring_definition(optimiser, torchs, options):
    assert distance(path(optimiser), path_in_torch(torchs, **options)) > 1e-6


class AdamWithoutCorrection(Adam):
    def update(self, state, gradient, parameters):
        moments, _ = super().update(state, gradient, parameters)
        return moments, elementwise(
            lambda w, u, s: w - self.lr * u / (np.sqrt(s) + self.eps),
            parameters,
            moments.mean,
            moments.square,
        )


class AdamWithEpsilonUnderTheRoot(Adam):
    def update(self, state, gradient, parameters):
        moments, _ = super().update(state, gradient, parameters)
        b1, b2 = (1 - beta**moments.num_updates for beta in self.betas)
        return moments, elementwise(
            lambda w, u, s: w - self.lr * u / b1 / np.sqrt(s / b2 + self.eps),
            parameters,
            moments.mean,
            moments.square,
        )


@pytest.mark.parametrize(
    "wrong", [AdamWithoutCorrection(eps=1e-2), AdamWithEpsilonUnderTheRoot(eps=1e-2)]
)
def test_the_comparison_with_torch_catches_a_misread_adam(wrong):
    assert distance(path(wrong), path_in_torch(torch.optim.Adam, eps=1e-2)) > 1e-6


@pytest.mark.parametrize(
    ("optimiser", "after_one", "after_two"),
    [
        (SGD(0.1), 0.95, 0.9),
        (Momentum(0.1, 0.9), 0.95, 0.855),  # v = 0.5, then 0.95
        (Nesterov(0.1, 0.9), 0.905, 0.7695),  # 0.5 + 0.45, then 0.5 + 0.855
        (Adagrad(0.1), 0.9, 0.9 - 0.1 / 2**0.5),  # s = 0.25, then 0.5
        (RMSProp(0.1, 0.75), 0.8, 0.8 - 0.2 / 1.75**0.5),  # s = 0.0625, then 0.109375
        (Adam(0.1), 0.9, 0.8),  # corrected, a constant gradient has mean 0.5 and square 0.25
        (AdamW(0.1, weight_decay=0.5), 0.85, 0.7075),  # 0.95 w - 0.1
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_two_updates_are_those_computed_by_hand(optimiser, after_one, after_two):
    w, g = [{"weight": np.array([1.0])}], [{"weight": np.array([0.5])}]
    state, w = optimiser.update(optimiser.start(w), g, w)
    # Epsilon, at most 1e-8 of 0.25 or more, is left out by hand.
    assert flatten(w) == pytest.approx([after_one], rel=1e-7)
    state, w = optimiser.update(state, g, w)
    assert flatten(w) == pytest.approx([after_two], rel=1e-7)


@pytest.mark.parametrize("optimiser", [pair[0] for pair in PAIRS], ids=str)
def test_an_update_changes_nothing_in_place(optimiser):
    before = flatten(START).copy()
    gradient = restructure(PUSHES[0].copy())
    state = optimiser.start(START)
    first = optimiser.update(state, gradient, START)[1]
    again = optimiser.update(state, gradient, START)[1]
    np.testing.assert_array_equal(flatten(first), flatten(again))
    np.testing.assert_array_equal(flatten(START), before)
    np.testing.assert_array_equal(flatten(gradient), PUSHES[0])
