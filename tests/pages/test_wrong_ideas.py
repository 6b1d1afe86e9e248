"""Six wrong ideas of a batch's gradient: every figure again, in NumPy alone.

Oracle: the same network one layer after the other, with derivatives written by hand; it shares no
code with the package, and no arithmetic with torch. 100 updates amplify rounding (1e-16 a step);
1e-6 is far above that, and far below the third digit that the page shows.
"""

import doctest
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from anybatch import questions
from network_by_hand import backward, errors_of, flat, losses

BATCH, LR, STRENGTH = 60, 0.3, 0.01
PICTURE = Path(__file__).parents[2] / "docs" / "wrong-ideas.svg"


def weighted(weights, x, y, counts, split=False, penalties=1):
    """Weigh each example's gradient, and add the penalty so many times."""
    total = backward(weights, x, errors_of(weights, x, y) * np.asarray(counts)[:, None], split)
    decay = [STRENGTH * w * (w.ndim > 1) for w in weights]
    return [g + penalties * d for g, d in zip(total, decay, strict=True)]


def read_curves(svg):
    """Return the points of each curve of a picture by name, in pixels."""
    lines = re.findall(r'<polyline points="([^"]+)"[^>]*stroke-width="2"', svg)
    names = re.findall(r'text-anchor="start">([^<]+)<', svg)
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines[::2]]
    return dict(zip(names, points, strict=True))  # each curve is followed by its legend


def mean_signal(weights, x, y):
    error = errors_of(weights, x, y).mean(0, keepdims=True)
    total = backward(weights, x.mean(0, keepdims=True), error)
    return [g + STRENGTH * w * (w.ndim > 1) for g, w in zip(total, weights, strict=True)]


EVEN = np.full(60, 1 / 60)
IDEAS = {
    "right": lambda w, x, y: weighted(w, x, y, EVEN),
    "last example only": lambda w, x, y: weighted(w, x, y, np.eye(60)[-1]),
    "mean error signal": mean_signal,
    "gradient split over winners": lambda w, x, y: weighted(w, x, y, EVEN, split=True),
    "mean of unequal means": lambda w, x, y: weighted(w, x, y, [1 / 72] * 54 + [1 / 24] * 6),
    "penalty once a micro-batch": lambda w, x, y: weighted(w, x, y, EVEN, penalties=4),
    "accumulation not divided": lambda w, x, y: weighted(w, x, y, 4 * EVEN),
}


def train(gradient, x, y, batches, curve=None):
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(6, 1, 3, 3))[:, 0] / 3, np.zeros(6)]
    weights += [generator.normal(size=(10, 54)) / np.sqrt(54), np.zeros(10)]
    for number, ids in enumerate(batches):
        if curve is not None and number % 10 == 0:
            curve.append((number, total_loss(weights, x, y)))
        steps = gradient(weights, x[ids], y[ids])
        weights = [w - LR * g for w, g in zip(weights, steps, strict=True)]
    return weights


def total_loss(weights, x, y):
    penalty = STRENGTH / 2 * sum((array**2).sum() for array in weights if array.ndim > 1)
    return losses(weights, x, y).mean() + penalty


@pytest.fixture(scope="module")
def problem():
    images, classes = load_digits(return_X_y=True)
    generator = np.random.default_rng(1)
    orders = [generator.permutation(1797)[:1740].reshape(29, 60) for _ in range(4)]
    return images.reshape(-1, 8, 8) / 16, classes, np.concatenate(orders)[:101]


@pytest.fixture(scope="module")
def expect(problem):
    """Distance, cosine and loss of each idea, by hand."""
    x, y, batches = problem
    trained = train(IDEAS["right"], x, y, batches[:100])
    last = x[batches[100]], y[batches[100]]
    right = flat(IDEAS["right"](trained, *last))
    rows = {}
    for name, idea in IDEAS.items():
        g = flat(idea(trained, *last))
        curve = []
        w = train(idea, x, y, batches[:100], curve)
        curve.append((100, total_loss(w, x, y)))
        size = np.linalg.norm
        cosine = g @ right / size(g) / size(right)
        rows[name] = (size(g - right) / size(right), cosine, curve[-1][1], curve)
    return rows


@pytest.fixture(scope="module")
def rows():
    return {idea.name: idea for idea in questions.wrong_ideas()}


@pytest.mark.parametrize("name", IDEAS)
def test_each_figure_is_that_of_numpy(name, rows, expect):
    assert list(rows) == list(IDEAS)
    assert rows[name][1:4] == pytest.approx(expect[name][:3], rel=1e-6, abs=1e-9)
    assert [number for number, _ in rows[name].curve] == list(range(0, 101, 10))
    by_hand = np.array(expect[name][3])
    assert np.array(rows[name].curve) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("name", IDEAS)
def test_the_drawn_curve_is_that_of_numpy(name, expect):
    sample = read_curves(PICTURE.read_text(encoding="utf8"))
    assert list(sample) == list(IDEAS)
    # The frame of benchmarks/svg.py: x from 70 to 530 for 0 to 100, y from 345 to 20 for 0 to 3.
    by_hand = [(70 + 4.6 * number, 345 - 325 / 3 * loss) for number, loss in expect[name][3]]
    assert np.array(sample[name]) == pytest.approx(np.array(by_hand), abs=0.06)  # one digit, drawn
    others = [np.array(points) for other, points in sample.items() if other != name]
    assert all(abs(points - np.array(by_hand)).max() > 0.06 for points in others)  # the control


def test_the_derivatives_by_hand_are_central_differences(problem):
    x, y, batches = problem
    x, y = x[batches[0]], y[batches[0]]
    weights = train(IDEAS["right"], x, y, [range(60)])  # no unit is left at its kink
    gradient = weighted(weights, x, y, EVEN, penalties=0)
    for array, by_hand in zip(weights, gradient, strict=True):
        place, step = (0,) * array.ndim, 1e-6
        ends = []
        for move in (step, -2 * step):
            array[place] += move
            ends.append(losses(weights, x, y).mean())
        array[place] += step
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(by_hand[place], rel=1e-6)


def test_the_oracle_tells_each_wrong_idea_from_the_right_one(expect):  # the control
    right = expect.pop("right")
    assert right[:2] == pytest.approx((0, 1))
    assert all(row[0] > 0.05 and abs(row[2] - right[2]) > 0.01 for row in expect.values())


def test_the_example_runs_and_leaves_the_generator():
    before = torch.get_rng_state()
    module = import_module("anybatch.questions.ideas")
    assert doctest.testmod(module) == (0, 4)  # none failed of four
    assert torch.equal(torch.get_rng_state(), before)


def test_the_page_of_an_update_has_these_figures(rows):
    import json

    from anybatch.report.page import WRONG_IDEAS

    result = json.loads(WRONG_IDEAS.read_text(encoding="utf8"))
    assert [idea["name"] for idea in result] == list(rows)
    for idea in result:
        measured = rows[idea["name"]]
        for key in ("distance", "cosine", "loss"):
            assert idea[key] == pytest.approx(getattr(measured, key), rel=1e-5, abs=1e-9), key
