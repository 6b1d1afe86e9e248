"""docs/answers.md: figures of its small network once more, in NumPy alone.

Oracle: `network_by_hand.py`. Of torch it takes the initial weights, of the package the ids of the
batches. Rounding differs by 1e-12, and the page shows three to five digits.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import anybatch as ab
from network_by_hand import backward, errors_of, flat, losses

PAGE = (Path(__file__).parents[2] / "docs" / "answers.md").read_text()
DIGITS, CLASSES = load_digits(return_X_y=True)
DIGITS = DIGITS.reshape(-1, 8, 8) / 16
BATCH = slice(0, 60)


def make_weights():
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(1, 6, 3), nn.Linear(54, 10)
    parameters = [*convolution.parameters(), *linear.parameters()]
    arrays = [p.detach().double().numpy().copy() for p in parameters]
    return [arrays[0][:, 0], *arrays[1:]]


def sum_gradients(weights, ids, split=False):
    x, y = DIGITS[ids], CLASSES[ids]
    return backward(weights, x, errors_of(weights, x, y), split)


def mean_gradients(weights, ids, split=False):
    size = len(CLASSES[ids])
    return [g / size for g in sum_gradients(weights, ids, split)]


def decay_of(weights, a):
    return [a * w * (w.ndim > 1) for w in weights]


def train(batches, rate, scale=1, a=0):
    """Train by `scale` times the mean gradient, plus the gradient of an L2 penalty."""
    weights = make_weights()
    for ids in batches:
        steps = zip(mean_gradients(weights, ids), decay_of(weights, a), strict=True)
        weights = [w - rate * (scale * g + d) for w, (g, d) in zip(weights, steps, strict=True)]
    return weights


def compare(wrong, right):
    wrong, right = flat(wrong), flat(right)
    distance = np.linalg.norm(wrong - right) / np.linalg.norm(right)
    cosine = wrong @ right / np.linalg.norm(wrong) / np.linalg.norm(right)
    return f"distance {distance:.2f}, cosine {cosine:.2f}"


@pytest.fixture(scope="module")
def train_by_hand():
    order = ab.Order(1797, batch_size=60, seed=0)
    batches = [np.asarray(order.indices(step)) for step in range(120)]
    last = loss_of(train(batches[:-1], 0.3), batches[-1])
    assert f"120 updates, loss of the last batch {last:.3f}" in PAGE
    return train(batches, 0.3)


def loss_of(weights, ids):
    return losses(weights, DIGITS[ids], CLASSES[ids]).mean()


def test_the_last_example_alone(train_by_hand):
    for when, weights in (("before", make_weights()), ("after", train_by_hand)):
        right = mean_gradients(weights, BATCH)
        output = compare(mean_gradients(weights, slice(59, 60)), right)
        assert f"last example alone, {when} training: {output}" in PAGE
        others = mean_gradients(weights, slice(0, 30))  # the control: half of the batch
        assert compare(mean_gradients(weights, slice(59, 60)), others) not in PAGE


def test_the_noise_of_one_example(train_by_hand):
    single = np.array([flat(sum_gradients(train_by_hand, slice(i, i + 1))) for i in range(1792)])
    noise = ((single - single.mean(0)) ** 2).sum(1).mean()
    assert f"B =  1: noise {noise:.4f}, B * noise {noise:.2f}" in PAGE


def test_loss_and_derivative_under_mean_and_sum(train_by_hand):
    loss, slope = loss_of(train_by_hand, BATCH), mean_gradients(train_by_hand, BATCH)[2][3, 20]
    for name, times in (("Mean", 1), ("Sum", 60)):
        output = f"derivative {times * slope:.4f}, by hand {times * slope:.4f}"
        assert f"{name:4s} loss {times * loss:8.4f}, {output}" in PAGE


def test_rates_and_penalties_of_a_sum(train_by_hand):
    batches = [slice(i, i + 60) for i in range(0, 1200, 60)]
    output = compare(train(batches, 0.3, scale=60), train(batches, 0.3))
    assert f"Sum, the same rate: {output}" in PAGE
    output = compare(train(batches, 0.3 / 60, scale=60, a=0.01), train(batches, 0.3, a=0.01))
    assert f"Sum, rate / 60, penalty as it was: {output}" in PAGE
    data, decay = mean_gradients(train_by_hand, BATCH), decay_of(train_by_hand, 0.01)
    wanted = [g + d for g, d in zip(data, decay, strict=True)]
    output = compare([g + d / 60 for g, d in zip(data, decay, strict=True)], wanted)
    assert f"(sum(loss) + penalty) / 60 : {output}" in PAGE


def test_the_sign_that_slipped():
    for sign in (-1, 1):
        first = loss_of(make_weights(), BATCH)
        last = loss_of(train([BATCH] * 10, -sign * 0.1), BATCH)
        assert f"W {sign * 0.1:+.1f} dL/dW: loss {first:.2f}, after 10 updates {last:.2f}" in PAGE


def test_one_long_step_and_sixty_short_ones():
    start = make_weights()
    online = train([slice(i, i + 1) for i in range(60)], 0.001)
    moved = [
        [w - s for w, s in zip(weights, start, strict=True)]
        for weights in (online, train([BATCH], 0.06), train([BATCH], 0.001))
    ]
    assert f"one update at 60 times the rate: {compare(moved[1], moved[0])}" in PAGE
    assert f"one update at the same rate: {compare(moved[2], moved[0])}" in PAGE


def test_the_gradient_split_over_winners(train_by_hand):
    right, wrong = (mean_gradients(train_by_hand, BATCH, split) for split in (False, True))
    assert f"split, all weights: {compare(wrong, right)}" in PAGE
    assert f"split, weights before the pooling: {compare(wrong[:2], right[:2])}" in PAGE
