"""Noise scale from the inner products of some examples.

Oracle: the estimate from all inner products, and the truth of a known population, 1,500 times.
Control: the examples whose inner products are nearest to the mean give too narrow an interval.
"""

import math

import numpy as np
import pytest
import torch

from anybatch.ledger.noise import noise_estimate
from noisy_gradients import estimates, figures, gaussian, share


def estimates_of_some(gradients, choose):
    """Estimate from batches [N, B, d] with the inner products of the examples that are chosen."""
    squares, inner, _, square = figures(gradients)
    squares, inner = torch.from_numpy(squares), torch.from_numpy(inner)
    for k in range(len(gradients)):
        some = torch.full_like(inner[k], math.nan)
        choice = choose(inner[k])
        some[choice] = inner[k][choice]
        yield noise_estimate(squares[k], some, None, float(square[k]))


def nearest_to_the_mean(inner):
    return (inner - inner.mean()).abs().argsort()[: len(inner) // 4]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [256 / 4, 256 * 4, 256 * 1000])
def test_a_quarter_of_the_inner_products_gives_as_good_an_interval(ratio):
    rng, some, nearest = np.random.default_rng(4), [], []
    for _ in range(6):
        batch = gaussian(rng, 250, ratio, size=256)
        every_fourth = estimates_of_some(batch, lambda inner: torch.arange(0, len(inner), 4))
        some += [e.scale() for e in every_fourth]
        nearest += [e.scale() for e in estimates_of_some(batch[:80], nearest_to_the_mean)]
    # 1,500 trials have a standard error of 0.6 %. Measured: 0.943, 0.947 and 0.959.
    assert 0.93 <= share(some, ratio) <= 0.97
    assert share(nearest, ratio) < 0.8  # the control: examples that were not taken at random


def test_missing_inner_products_change_the_interval_alone():
    batch = gaussian(np.random.default_rng(1), 20, 64, size=256)
    for whole, some, none in zip(
        estimates(batch),
        estimates_of_some(batch, lambda inner: torch.arange(0, len(inner), 4)),
        estimates(batch, with_inner=False),
        strict=True,
    ):
        for other in (some, none):
            assert other.variance == pytest.approx(whole.variance, rel=1e-12)
            assert other.gradient_square == pytest.approx(whole.gradient_square, rel=1e-12)
        assert some.var_h == pytest.approx(whole.var_h, rel=0.6)
        assert some.var_h != whole.var_h
        assert some.scale().high / whole.scale().high == pytest.approx(1, rel=0.5)
        assert math.isnan(none.scale().high)
        assert (whole.degrees, some.degrees) == (256, 64)
