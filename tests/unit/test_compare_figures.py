"""Paired intervals, and training curves at equal numbers of examples."""

import math

import numpy as np
import pytest

from anybatch.advice.curves import Curve, choose_grid
from anybatch.advice.pairs import compare_pairs, find_student_quantile
from anybatch.errors import RunError

# 97.5 % quantiles as printed in tables of Student's t, to three decimals.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 29: 2.045, 30: 2.042}


@pytest.mark.parametrize(("degrees", "expected"), TABLE.items())
def test_the_quantile_is_that_of_the_tables(degrees, expected):
    assert round(find_student_quantile(degrees), 3) == expected


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 50, 199])
def test_the_quantile_leaves_five_per_cent_outside(degrees):
    """Oracle: the density integrated by the trapezoidal rule, in y = t / sqrt(t^2 + nu).

    Tolerance: the rule's own error, on 200,000 intervals, where one degree is singular at its end.
    """
    t = find_student_quantile(degrees)
    y = np.linspace(0, t / math.sqrt(t * t + degrees), 200_001)
    log_beta = math.lgamma(0.5) + math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    density = 2 * (1 - y**2) ** (degrees / 2 - 1) / math.exp(log_beta)
    assert np.trapezoid(density, y) == pytest.approx(0.95, abs=1e-8)


def test_the_paired_interval_is_that_by_hand():
    """Differences 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, variance 14/3; t(3) = 3.182446."""
    result = compare_pairs([10.0, 20.0, 30.0, 40.0], [11.0, 22.0, 33.0, 46.0])
    assert (result.pairs, result.mean) == (4, 3.0)
    # Tolerance: hand-computed to seven digits.
    assert result.spread == pytest.approx(2.1602469, abs=1e-7)
    half = 3.182446 * 2.1602469 / 2
    assert (result.low, result.high) == pytest.approx((3 - half, 3 + half), abs=1e-6)


def test_the_paired_interval_leaves_out_what_a_seed_does_to_both():
    """The control: an unpaired interval (Welch) over the same figures holds 0, the paired not."""
    by_seed = np.random.default_rng(0).normal(0, 1.0, 8)
    first = by_seed + np.array([0.01, -0.01, 0.0, 0.02, -0.02, 0.0, 0.01, -0.01])
    second = by_seed + 0.1
    result = compare_pairs(first.tolist(), second.tolist())
    assert result.low > 0
    half = find_student_quantile(7) * math.sqrt(first.var(ddof=1) / 8 + second.var(ddof=1) / 8)
    assert second.mean() - first.mean() - half < 0


def test_the_interval_holds_the_truth_in_95_per_cent_of_trials():
    """Tolerance: 4 standard deviations of a share of 4,000 trials. Control: the normal's 1.96."""
    draws = np.random.default_rng(1).normal(0.3, 2.0, (4000, 4))
    result = [compare_pairs([0.0] * 4, draw.tolist()) for draw in draws]
    allowed = 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert abs(np.mean([one.low < 0.3 < one.high for one in result]) - 0.95) < allowed
    normal = np.mean([abs(one.mean - 0.3) < 1.96 * one.spread / 2 for one in result])
    assert abs(normal - 0.95) > allowed


def test_equal_figures_differ_by_exactly_nothing():
    result = compare_pairs([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (result.mean, result.spread, result.low, result.high) == (0, 0, 0, 0)


def test_a_single_pair_has_no_interval_and_none_is_refused():
    result = compare_pairs([1.0], [3.0])
    assert result.mean == 2
    assert all(map(math.isnan, (result.spread, result.low, result.high)))
    with pytest.raises(RunError, match="the figures are 0 and 0"):
        compare_pairs([], [])
    with pytest.raises(RunError, match="the figures are 2 and 1"):
        compare_pairs([1.0, 2.0], [1.0])


def curve(sizes, losses, first_epoch):
    return Curve(ends=np.cumsum(sizes).tolist(), losses=losses, first_epoch=first_epoch)


@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_a_smoothed_curve_is_the_mean_of_the_last_examples_one_by_one(window):
    """Oracle: a list with the loss of every example. Tolerance: sums in float64."""
    draw = np.random.default_rng(2)
    sizes = draw.integers(1, 40, 50).tolist()
    losses = draw.normal(1, 1, 50).tolist()
    each = [loss for size, loss in zip(sizes, losses, strict=True) for _ in range(size)]
    grid = np.arange(window, len(each) + 1)
    result = curve(sizes, losses, 100).smooth(grid.astype(float), window)
    brute = [np.mean(each[x - window : x]) for x in grid]
    assert result == pytest.approx(brute, abs=1e-11)


def test_the_figure_is_the_mean_over_examples_and_not_over_updates():
    """64 examples of loss 1 and then 2 of loss 10: (64 + 20) / 66. The control: (1 + 10) / 2."""
    result = curve([64, 2], [1.0, 10.0], 64).mean(0, 66)
    assert result == pytest.approx(84 / 66, rel=1e-15)  # one division
    assert result != pytest.approx(5.5, rel=0.1)


def test_the_same_losses_at_two_batch_sizes_have_the_same_curve():
    each = np.linspace(2, 1, 120)
    small = curve([10] * 12, each.reshape(12, 10).mean(1).tolist(), 120)
    large = curve([40] * 3, each.reshape(3, 40).mean(1).tolist(), 120)
    grid = np.array([40.0, 80.0, 120.0])  # where both have ends
    # Tolerance: sums in float64.
    assert small.smooth(grid, 40) == pytest.approx(large.smooth(grid, 40), rel=1e-12)


def test_the_grid_ends_with_the_shortest_run_and_smooths_over_the_largest_batch():
    small, large = curve([10] * 300, [1.0] * 300, 1000), curve([250] * 8, [1.0] * 8, 1000)
    grid, window = choose_grid([small, large])
    assert window == 250
    assert (grid[0], grid[-1]) == (250, 2000)
    _, tenth = choose_grid([small])
    assert tenth == 100
