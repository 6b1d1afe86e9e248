"""Verdict of a comparison in words.

Oracle: SciPy's paired t-test and its Student quantiles, which share no code with `pairs`.
"""

import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from anybatch.advice.comparison import Comparison, Figure, list_verdicts
from anybatch.advice.pairs import MAX_PAIRS, PairedDifference, compare_pairs, count_needed_pairs


def make_comparison(first: list[float], other: list[float]) -> Comparison:
    """A comparison of one figure in pairs."""
    values = {"a": dict(enumerate(first)), "b": dict(enumerate(other))}
    figure = Figure(
        values=values, differences={"b": compare_pairs(first, other) if first else None}
    )
    empty: Any = {}
    return Comparison(
        names=["a", "b"],
        figures={"held-out loss": figure},
        start=0,
        stop=0,
        window=0,
        grid=np.zeros(0),
        curves=empty,
    )


def pairs_by_search(mean: float, spread: float) -> int:
    """Return the least n whose 95 % interval leaves out 0, by SciPy's quantiles."""
    n = 2
    while stats.t.ppf(0.975, n - 1) * spread / n**0.5 >= abs(mean):
        n += 1
    return n


@pytest.mark.fast(1)
@pytest.mark.parametrize(("mean", "spread"), [(1.0, 2.0), (-0.1, 0.31), (0.5, 0.1), (3.0, 40.0)])
def test_pairs_needed_are_those_of_a_t_test(mean: float, spread: float) -> None:
    one = PairedDifference(pairs=3, mean=mean, spread=spread, low=-9.0, high=9.0)
    assert count_needed_pairs(one) == pairs_by_search(mean, spread)
    by_normal = int(np.ceil((1.96 * spread / mean) ** 2))
    assert count_needed_pairs(one) != by_normal  # control: few pairs need Student's t


@pytest.mark.slow
def test_a_difference_that_no_number_of_pairs_shows_is_told_so() -> None:
    assert (
        count_needed_pairs(PairedDifference(pairs=3, mean=1e-9, spread=1.0, low=-1.0, high=1.0))
        is None
    )
    (text,) = list_verdicts(make_comparison([0.0, 2.0, 1.0], [1.0, 1.0, 1.0 + 1e-9]))
    assert f"More than {MAX_PAIRS:,} pairs would be needed" in text


@pytest.mark.parametrize("seed", range(6))
def test_the_verdict_is_that_of_scipys_paired_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=5)
    other = first + rng.normal(0.3 * (-1) ** seed, 0.25, size=5)
    (text,) = list_verdicts(make_comparison(first.tolist(), other.tolist()))
    if stats.ttest_rel(other, first).pvalue < 0.05:
        word = "lower" if other.mean() < first.mean() else "higher"
        assert f"Held-out loss: b is {word} than a by" in text
        assert "as 5 pairs show" in text
    else:
        assert "5 pairs cannot tell b from a" in text
        needed = re.search(r"About ([\d,]+) would", text)
        assert needed
        difference = other - first
        expected = pairs_by_search(difference.mean(), difference.std(ddof=1))
        assert int(needed[1].replace(",", "")) == expected > 5


def test_both_verdicts_are_among_the_seeds_above() -> None:  # the control
    message = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        first = rng.normal(size=5)
        other = first + rng.normal(0.3 * (-1) ** seed, 0.25, size=5)
        message.add(bool(stats.ttest_rel(other, first).pvalue < 0.05))
    assert message == {True, False}


def test_one_pair_none_and_equal_pairs_are_told_as_such() -> None:
    assert "one pair cannot tell b from a" in list_verdicts(make_comparison([1.0], [2.0]))[0]
    assert "no seed has a run of both a and b" in list_verdicts(make_comparison([], []))[0]
    assert (
        "b and a are equal in all 3 pairs"
        in list_verdicts(make_comparison([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]))[0]
    )
