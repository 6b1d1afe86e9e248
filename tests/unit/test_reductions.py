"""Reductions against the rows of their table, written out in three ways that share no code.

loops       one example at a time in Python floats, `row`: value and coefficients, ties included
autograd    the formula in torch, differentiated, `FORMULAS`: away from ties
limits      what one reduction becomes at the end of its range
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import LossError
from anybatch.example_losses import ExampleLosses
from anybatch.reductions import (
    Function,
    GroupDRO,
    Max,
    Mean,
    Scaled,
    Sum,
    Tilted,
    TopFraction,
    as_reduction,
)
from losses_to_reduce import batches, losses_of, seeded

REDUCTIONS = [
    Mean(),
    Sum(),
    Max(),
    *(TopFraction(q) for q in (0.01, 0.1, 0.3, 0.5, 0.77, 1)),
    *(Tilted(t) for t in (-30.0, -0.5, 1e-6, 1.0, 30.0)),
    0.01 * Mean(),
    -2 * TopFraction(0.3),
]


# ------------------------------------------------------------------------------ oracle: loops


def row(reduction, losses):
    """(R, [c_i]) of a row of the table, examples with n_i = 0 left out, their c_i 0."""
    values, counts = losses.values.numpy(), losses.weights.numpy()
    here = [i for i, n in enumerate(counts) if n > 0]
    v, n = [float(values[i]) for i in here], [float(counts[i]) for i in here]
    m = [float(values[i] / counts[i]) for i in here]  # rounded as the dtype has it: ties are ties
    value, c = value_and_coefficients(reduction, v, n, m)
    coefficients = [0.0] * len(values)
    for i, c_i in zip(here, c, strict=True):
        coefficients[i] = c_i
    return value, coefficients


def value_and_coefficients(reduction, v, n, m):
    match reduction:
        case Scaled(scale, inner):
            value, c = value_and_coefficients(inner, v, n, m)
            return scale * value, [scale * c_i for c_i in c]
        case Mean():
            return math.fsum(v) / math.fsum(n), [1 / math.fsum(n)] * len(v)
        case Sum():
            return math.fsum(v), [1.0] * len(v)
        case Max():
            ties = [m_i == max(m) for m_i in m]
            return max(m), [tie / (n_i * sum(ties)) for tie, n_i in zip(ties, n, strict=True)]
        case TopFraction(q):
            return top_fraction(q, n, m)
        case Tilted(t):
            pivot = max(t * m_i for m_i in m) / t
            e = [math.exp(t * (m_i - pivot)) for m_i in m]
            share = [e_i / math.fsum(e) for e_i in e]
            value = pivot + math.log1p(math.fsum(x - 1 for x in e) / len(m)) / t
            return value, [s / n_i for s, n_i in zip(share, n, strict=True)]


def top_fraction(q, n, m):
    k = max(Fraction(str(q)) * len(m), Fraction(1))
    selection = [1.0] * math.floor(k) + [float(k - math.floor(k))] + [0.0] * len(m)
    ranked = list(zip(sorted(m, reverse=True), selection, strict=False))
    value = math.fsum(x * w for x, w in ranked) / k
    shares = {x: [w for y, w in ranked if y == x] for x in set(m)}  # ties share equally
    means = {x: math.fsum(w) / len(w) for x, w in shares.items()}
    return value, [means[x] / float(k) / n_i for x, n_i in zip(m, n, strict=True)]


def assert_row(reduction, losses, tolerance):
    value, coefficients = row(reduction, losses)
    reduced = reduction.reduce(losses)
    assert reduced.value.dtype == reduced.coefficients.dtype == losses.values.dtype
    assert reduced.value.shape == ()
    assert reduced.state is None
    scale = max(1.0, losses.values.abs().sum().item(), losses.means.abs().max().item())
    assert math.isclose(reduced.value, value, abs_tol=tolerance * scale)
    np.testing.assert_allclose(reduced.coefficients, coefficients, rtol=tolerance, atol=1e-30)


@seeded
@given(losses=batches(), reduction=st.sampled_from(REDUCTIONS))
def test_value_and_coefficients_are_those_of_the_table_in_float64(losses, reduction):
    # Tolerance: sums of 40 terms, exponents up to 30 * 400 rounded once: 1e4 * 2^-53.
    assert_row(reduction, losses, 2e-12)


@seeded
@given(losses=batches(torch.float32), reduction=st.sampled_from(REDUCTIONS))
def test_value_and_coefficients_are_those_of_the_table_in_float32(losses, reduction):
    # Tolerance: sums of 40 terms, each rounded once: 40 * 2^-24. Tilted computes in float64.
    assert_row(reduction, losses, 3e-6)


@pytest.mark.parametrize(
    "classic",
    [
        lambda v, n: (v / n).mean(),  # mean of means
        lambda v, n: v.sum() / len(v),  # divided by B, not by the sum of counts
    ],
)
def test_the_table_tells_the_classic_mistakes_from_the_mean(classic):
    losses = losses_of([1.0, 2.0, 6.0], counts=[1.0, 4.0, 2.0])
    value, _ = row(Mean(), losses)
    assert value == 9 / 7
    assert abs(classic(losses.values, losses.weights) - value) > 0.1


# --------------------------------------------------------------------------- oracle: autograd


def top_formula(q):
    def formula(v, n):
        k = max(q * len(v), 1.0)
        top = (v / n).sort(descending=True).values
        rest = (k - math.floor(k)) * top[math.floor(k)] if k > math.floor(k) else 0
        return (top[: math.floor(k)].sum() + rest) / k

    return formula


FORMULAS = [
    (Mean(), lambda v, n: v.sum() / n.sum()),
    (Sum(), lambda v, n: v.sum()),
    (Max(), lambda v, n: (v / n).max()),
    (TopFraction(0.25), top_formula(0.25)),
    (TopFraction(0.7), top_formula(0.7)),
    (Tilted(0.5), lambda v, n: (0.5 * v / n).exp().mean().log() / 0.5),
    (Tilted(-0.2), lambda v, n: (-0.2 * v / n).exp().mean().log() / -0.2),
    (3 * Max(), lambda v, n: 3 * (v / n).max()),
]


@seeded
@given(losses=batches(unique=True), which=st.sampled_from(FORMULAS))
def test_coefficients_are_the_derivative_of_the_formula(losses, which):
    reduction, formula = which
    if len(set(losses.means.tolist())) < len(losses.values):
        return  # at a tie the formula has no derivative
    values = losses.values.clone().requires_grad_()
    value = formula(values, losses.weights)
    (expected,) = torch.autograd.grad(value, values)
    reduced = reduction.reduce(losses)
    # Tolerance: exponents up to 100 rounded once, and the sums of 40 terms of both sides.
    torch.testing.assert_close(reduced.value, value.detach(), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(reduced.coefficients, expected, rtol=1e-11, atol=1e-14)


# ---------------------------------------------------------------------------------- relations


ALL = [*REDUCTIONS, GroupDRO(0.3), Function(lambda losses: (losses.values**2).mean())]


@seeded
@given(losses=batches(unique=True), reduction=st.sampled_from(ALL), seed=st.integers(0, 99))
def test_an_example_without_a_count_is_as_if_absent_bit_for_bit(losses, reduction, seed):
    rng = np.random.default_rng(seed)
    size = len(losses.values)
    place = np.sort(rng.permutation(size + 5)[:size])
    groups = torch.as_tensor(rng.integers(0, 3, size))
    losses = ExampleLosses(losses.values, losses.weights, groups)
    padded = losses_of(
        rng.choice([math.nan, math.inf, 99.0], size + 5),
        [0.0] * (size + 5),
        groups=[-1] * (size + 5),
    )
    for target, source in (
        (padded.values, losses.values),
        (padded.counts, losses.counts),
        (padded.groups, groups),
    ):
        target[place] = source
    alone, among = reduction.reduce(losses), reduction.reduce(padded)
    assert torch.equal(among.value, alone.value)
    assert torch.equal(among.coefficients[place], alone.coefficients)
    assert among.coefficients.count_nonzero() == alone.coefficients.count_nonzero()
    assert alone.state is None or torch.equal(among.state, alone.state)


@seeded
@given(losses=batches(unique=True))
def test_sum_is_the_number_of_examples_times_the_mean(losses):
    losses = ExampleLosses(losses.values)
    total, mean = Sum().reduce(losses), Mean().reduce(losses)
    size = len(losses.values)
    # Tolerance: 1/B and its product are rounded once each.
    torch.testing.assert_close(total.value, size * mean.value, rtol=1e-15, atol=0)
    torch.testing.assert_close(total.coefficients, size * mean.coefficients, rtol=1e-15, atol=0)


@seeded
@given(losses=batches(torch.float32))
def test_the_top_fraction_runs_from_the_maximum_to_the_mean_of_means(losses):
    num_examples = int(losses.present.sum())
    for q in (1e-9, 0.5 / num_examples, 1 / num_examples):
        top, largest = TopFraction(q).reduce(losses), Max().reduce(losses)
        assert torch.equal(top.value, largest.value)
        torch.testing.assert_close(top.coefficients, largest.coefficients, rtol=2e-7, atol=0)
    means = losses.means[losses.present]
    # Tolerance: sums of 40 float32 terms of up to 200.
    torch.testing.assert_close(TopFraction(1).reduce(losses).value, means.mean(), rtol=0, atol=2e-4)


@seeded
@given(losses=batches(unique=True))
def test_tilted_runs_from_the_minimum_over_the_mean_to_the_maximum(losses):
    m = losses.means
    width, size = (m.max() - m.min()).item(), len(m)
    for t, limit in ((1e7, m.max()), (-1e7, m.min())):  # off by at most log(B) / t
        assert abs(Tilted(t).reduce(losses).value - limit) <= math.log(size) / 1e7 + 1e-12
    for t in (1e-15, -1e-15, 1e-9):  # off by t/2 times the variance, and by rounding
        error = abs(Tilted(t).reduce(losses).value - m.mean()).item()
        assert error <= abs(t) * width**2 + 1e-14 * (width + m.abs().max().item())


def test_tilted_by_its_formula_alone_would_lose_the_mean_at_a_small_tilt():
    m, t = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), 1e-15
    assert abs((t * m).exp().mean().log() / t - m.mean()) > 0.01
    assert abs(Tilted(t).reduce(ExampleLosses(m)).value - m.mean()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tilted_does_not_overflow(dtype):
    reduced = Tilted(100.0).reduce(losses_of([1e30, 1e30, -1e30], dtype=dtype))
    assert reduced.value == torch.tensor(1e30, dtype=dtype)  # log(2/3)/100 is far below its bits
    assert reduced.coefficients.tolist() == [0.5, 0.5, 0]


def test_a_tenth_of_thirty_examples_is_three():
    c = TopFraction(0.1).reduce(losses_of(range(30))).coefficients
    assert c[27:].tolist() == [1 / 3] * 3
    assert not c[:27].any()


def test_seven_per_cent_of_a_hundred_examples_are_seven():
    assert math.ceil(0.07 * 100) == 8  # what floating point alone would make of it
    c = TopFraction(0.07).reduce(losses_of(range(100))).coefficients
    assert c[93:].tolist() == [1 / 7] * 7
    assert not c[:93].any()


def test_ties_at_the_cut_share_equally_what_is_left_for_them():
    # k = 0.7 * 5 = 3.5: the 9 counts once, the three 4s share 2.5.
    reduced = TopFraction(0.7).reduce(losses_of([4.0, 9.0, 4.0, 1.0, 4.0]))
    expected = torch.tensor([2.5 / 3, 1, 2.5 / 3, 0, 2.5 / 3], dtype=torch.float64) / 3.5
    torch.testing.assert_close(reduced.coefficients, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(reduced.value.item(), (9 + 2.5 * 4) / 3.5, rtol=1e-15, atol=0)


def test_a_scaled_reduction_keeps_the_factor_of_a_linear_one_alone():
    twice = 0.01 * Mean() * 2
    assert twice.factor(8.0, 8) == 2 * (0.01 * (1 / 8))
    assert (3 * Sum()).factor(8.0, 8) == 3
    assert (2 * Max()).factor(8.0, 8) is None
    assert (2 * as_reduction(lambda losses: losses.values.sum())).factor(8.0, 8) is None


@pytest.mark.parametrize("reduction", [*ALL, 0.1 * GroupDRO(0.1)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_loss_that_is_no_number_never_disappears(reduction, place):
    values = [float(i) for i in range(10)]
    values[place] = math.nan
    assert reduction.reduce(losses_of(values, groups=[0, 1] * 5)).value.isnan()


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            losses_of([1.0, 2.0], [1.0, -2.0]),
            "example 1 of the batch is -2.0. It must be finite and at least 0",
        ),
        (
            losses_of([1.0, 2.0], [math.nan, 1.0]),
            "example 0 of the batch is nan. It must be finite",
        ),
        (
            losses_of([1.0, 2.0], [1.0, math.inf]),
            "example 1 of the batch is inf. It must be finite",
        ),
        (losses_of([1.0, 2.0], [0.0, 0.0]), "All counts of the batch are 0.*every token masked"),
        (losses_of([]), "The batch is empty. A reduction needs at least one example"),
        (losses_of([], []), "The batch is empty. A reduction needs at least one example"),
    ],
)
@pytest.mark.parametrize("reduction", ALL, ids=lambda r: type(r).__name__)
def test_counts_that_no_reduction_can_use_are_refused(reduction, losses, message):
    with pytest.raises(LossError, match=message):
        reduction.reduce(losses)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, GroupDRO(0.1)], ids=lambda r: type(r).__name__)
def test_rows_of_values_are_refused_where_one_value_an_example_is_needed(reduction):
    with pytest.raises(
        LossError, match=r"values of shape \(4, 3\)\. It takes one value per example\. Sum"
    ):
        reduction.reduce(ExampleLosses(torch.zeros(4, 3), groups=torch.zeros(4, dtype=torch.int)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopFraction(0), "q=0. It must be a fraction, 0 < q <= 1"),
        (lambda: TopFraction(1.01), "q=1.01. It must be a fraction, 0 < q <= 1"),
        (lambda: TopFraction(math.nan), "q=nan. It must be a fraction, 0 < q <= 1"),
        (lambda: Tilted(0), "t=0. It must be finite and not 0. For t = 0 use Mean"),
        (lambda: Tilted(math.inf), "t=inf. It must be finite and not 0"),
        (lambda: Tilted(math.nan), "t=nan. It must be finite and not 0"),
        (lambda: GroupDRO(-0.1), "eta=-0.1. It must be finite and at least 0"),
        (lambda: GroupDRO(math.nan), "eta=nan. It must be finite and at least 0"),
        (
            lambda: math.inf * Mean(),
            r"Mean\(\) is multiplied by inf. The factor must be a finite number",
        ),
        (lambda: as_reduction("mean"), r"is 'mean'. It must be a reduction such as ab.Mean\(\)"),
        (lambda: as_reduction(None), r"is None. It must be a reduction such as ab.Mean\(\)"),
        (lambda: as_reduction(Mean), r"is the class Mean. Write Mean\(\.\.\.\), with parenth"),
    ],
)
def test_a_reduction_out_of_its_range_is_refused(make, message):
    with pytest.raises(LossError, match=message):
        make()
