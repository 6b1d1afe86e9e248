"""Weighted draws against exact fractions, frequencies by chi-square, means by standard errors.

p-values of frequencies must exceed `DOUBT` = 1e-5, which draws from the weights do not with
probability 1e-5 at other seeds. Means may be 4.5 standard errors off (probability 7e-6).
"""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
from anybatch.errors import OrderError
from anybatch.order import weighted as module
from anybatch.order.weighted import Weighted
from orders_by_hand import weighted
from properties import seeded_examples

DOUBT = 1e-5
WEIGHTS = [0.0, 3.0, 1.0, 0.5, 2.0, 0.0, 8.0, 0.125, 5.0, 0.0]
POSITIVE = [i for i, weight in enumerate(WEIGHTS) if weight > 0]
SHARES = np.array(WEIGHTS) / sum(WEIGHTS)

reproducible = seeded_examples(40)
some_weights = st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=1, max_size=60).filter(any)


def draws(order, epochs):
    return torch.cat([order.indices(step) for step in range(order.num_steps(epochs))]).numpy()


@reproducible
@given(some_weights, st.integers(0, 2**64 - 1), st.data())
def test_draws_are_those_of_exact_fractions(weights, seed, data):
    # Sums in float64 are up to 1e-14 off: a draw so near the border is not met at these seeds.
    batch_size = data.draw(st.integers(1, len(weights)))
    order = Weighted(weights, batch_size=batch_size, seed=seed)
    result = [order.indices(step).tolist() for step in range(order.num_steps(3))]
    assert result == weighted(weights, batch_size, seed, epochs=3)


def test_the_oracle_tells_weights_and_seeds_apart():
    assert weighted(WEIGHTS, 4, 0, 3) != weighted(WEIGHTS[::-1], 4, 0, 3)
    assert weighted(WEIGHTS, 4, 0, 3) != weighted(WEIGHTS, 4, 1, 3)


# ---------------------------------------------------------------- frequencies


def chi_square_p(samples, shares):
    """P-value of the counts; cells of share 0 must be empty and are left out."""
    cells = shares > 0
    counts, expected = np.bincount(samples, minlength=len(shares)), len(samples) * shares
    assert counts[~cells].sum() == 0
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    half = torch.tensor([(cells.sum() - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


def test_frequencies_are_in_proportion_to_the_weights():
    samples = draws(Weighted(WEIGHTS, batch_size=10, seed=3), 8000)
    assert len(samples) == 80_000
    assert chi_square_p(samples, SHARES) > DOUBT
    assert chi_square_p(samples[:40_000], SHARES) > DOUBT


def test_other_proportions_are_seen():  # the control: a weight 10 per cent off
    samples = draws(Weighted(WEIGHTS, batch_size=10, seed=3), 8000)
    off = SHARES * np.where(np.arange(10) == 6, 1.1, 1)
    assert chi_square_p(samples, off / off.sum()) < DOUBT


def test_one_draw_says_nothing_of_the_next():
    samples = draws(Weighted(WEIGHTS, batch_size=10, seed=5), 8000)
    joint = np.outer(SHARES, SHARES).ravel()
    assert chi_square_p(samples[:-1:2] * 10 + samples[1::2], joint) > DOUBT
    sticky = np.repeat(samples[::20], 10)[: len(samples) // 2]  # the control
    assert chi_square_p(sticky[:-1] * 10 + sticky[1:], joint) < DOUBT


@pytest.mark.parametrize(("words", "sample"), [(0, POSITIVE[0]), (2**64 - 1, POSITIVE[-1])])
def test_the_least_and_the_largest_number_draw_no_weight_of_0(monkeypatch, words, sample):
    monkeypatch.setattr(
        module, "random_words", lambda _, __, count: np.full(count, words, np.uint64)
    )
    assert Weighted(WEIGHTS, batch_size=4).indices(0).tolist() == [sample] * 4
    ragged = np.random.default_rng(0).random(1000)  # sums that round
    assert Weighted([*ragged, 0.0], batch_size=1).indices(0).item() == (999 if words else 0)


def test_only_proportions_matter_however_large_or_small():
    order = Weighted(WEIGHTS, batch_size=10)
    for factor in (2.0**-900, 2.0**900):
        scaled = Weighted(np.array(WEIGHTS) * factor, batch_size=10)
        assert (draws(scaled, 50) == draws(order, 50)).all()
    huge = Weighted([1.7e308] * 4, batch_size=4)  # their sum is not a float64
    assert set(draws(huge, 20)) == {0, 1, 2, 3}
    assert set(draws(Weighted([0.0, 5e-324], batch_size=1), 20)) == {1}


# ---------------------------------------------------------------- what is minimised


def deviation(values, mean):
    """Measure how far the mean of values is from `mean`, in standard errors."""
    return abs(values.mean() - mean) / (values.std(ddof=1) / math.sqrt(len(values)))


def gradients(correction):
    """d/dw of the mean over each batch of correction_i (w - x_i)^2 / 2 at w = 0."""

    def example_losses(model, batch):
        x, factor = batch
        return factor * (model.weight[0] - x[:, 0]) ** 2 / 2

    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    x = torch.arange(10.0, dtype=torch.float64)[:, None]
    order = Weighted(WEIGHTS, batch_size=10, seed=1)
    batches = ab.batches((x, correction), order, stop=1500)
    result = []
    for batch in batches:
        ab.batch_gradient(model, ab.Objective(example_losses), batch.examples, ids=batch.ids)
        result.append(model.weight.grad.item())
    return np.array(result)


def test_the_gradient_has_the_mean_of_the_weighted_objective():
    x = np.arange(10)
    result = gradients(torch.ones(10, dtype=torch.float64))
    assert deviation(result, -(SHARES * x).sum()) < 4.5
    assert deviation(result, -x.mean()) > 20  # the control: it is not that of the plain mean


def test_losses_divided_by_their_share_give_the_plain_mean():
    x, correction = np.arange(10), 1 / (10 * torch.from_numpy(SHARES))
    result = gradients(correction.where(correction.isfinite(), 0))
    plain = -x[POSITIVE].sum() / 10  # of those that can be drawn
    assert deviation(result, plain) < 4.5
    assert deviation(result, -(SHARES * x).sum()) > 20  # the control


# ---------------------------------------------------------------- a value


def test_each_draw_of_an_example_is_a_visit_of_its_own():
    order = Weighted([1.0, 9.0, 0.0], batch_size=3)
    visits = [
        pair
        for t in range(40)
        for pair in zip(order.indices(t).tolist(), order.visits(t), strict=True)
    ]
    assert len(set(visits)) == 120
    assert {example for example, _ in visits} == {0, 1}


def test_it_prints_no_weights_but_a_digest_that_tells_them_apart():
    order = Weighted(np.ones(1000), batch_size=32, seed=2)
    other = Weighted([*np.ones(999), 1 + 2e-16], batch_size=32, seed=2)
    assert len(repr(order)) < 200
    assert repr(order) == repr(Weighted(torch.ones(1000), batch_size=np.int8(32), seed=2))
    assert repr(order) != repr(other)
    assert order == pickle.loads(pickle.dumps(order)) != other
    assert hash(order) == hash(pickle.loads(pickle.dumps(order)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": []}, r"weights have shape \(0,\).*with N at least 1"),
        ({"weights": 1.0}, r"weights have shape \(\).*one number per example"),
        ({"weights": [0.0, 0.0]}, "All 2 weights are 0. At least one must be above 0"),
        ({"weights": [1, 1, -2]}, r"weights\[2\] is -2.0. .* at least 0; 1 of 3 are not"),
        ({"weights": [1, math.nan]}, r"weights\[1\] is nan. .*finite"),
        ({"weights": [math.inf, 1]}, r"weights\[0\] is inf. .*finite"),
        ({"batch_size": 0}, "batch_size is 0. It must be at least 1"),
        (
            {"batch_size": 5},
            "batch_size is 5. It must be at most num_examples, 4.*does not fill one",
        ),
        ({"seed": 2**64}, r"must be less than 2\^64"),
        ({"seed": 0.5}, "seed is 0.5 of type float"),
    ],
)
def test_mistaken_arguments_are_refused_with_the_fix(arguments, message):
    with pytest.raises(OrderError, match=message):
        Weighted(**{"weights": [1, 2, 3, 4], "batch_size": 2} | arguments)
