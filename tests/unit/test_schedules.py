"""Schedules against plain loops over the examples; they are counted in examples, not in steps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import RecipeError
from anybatch.schedules import Constant, Cosine, Exponential, Inverse, StepDecay, WarmUp
from properties import seeded_examples

seeded = seeded_examples(50)


def by_loop(lr, factor, drops, last):
    """Rate after 0, 1, .. last examples, multiplied whenever one of the drops is reached."""
    rates = []
    for examples in range(last + 1):
        if examples in drops:
            lr = lr * factor
        rates.append(lr)
    return rates


@given(lr=st.floats(0, 10), examples=st.integers(0, 10**12))
@seeded
def test_a_constant_is_the_same_throughout(lr, examples):
    assert Constant(lr)(examples) == lr


@seeded
@given(
    factor=st.sampled_from([0.1, 0.5, 0.97, 2.0]),
    every=st.integers(1, 30),
    last=st.integers(0, 100),
)
def test_step_decay_drops_every_so_many_examples(factor, every, last):
    drops = range(every, last + 1, every)
    got = [StepDecay(0.3, factor, every=every)(examples) for examples in range(last + 1)]
    # Tolerance: up to 100 factors, rounded once each, against one power.
    np.testing.assert_allclose(got, by_loop(0.3, factor, drops, last), rtol=1e-13)


@seeded
@given(drops=st.sets(st.integers(1, 60), min_size=1, max_size=5))
def test_step_decay_drops_at_the_examples_named(drops):
    schedule = StepDecay(0.3, 0.1, at=tuple(sorted(drops)))
    got = [schedule(examples) for examples in range(80)]
    # Tolerance: up to 5 factors, rounded once each, against one power.
    np.testing.assert_allclose(got, by_loop(0.3, 0.1, drops, 79), rtol=1e-14)


def test_a_drop_acts_from_the_update_that_begins_with_its_examples():
    schedule = StepDecay(1.0, 0.5, at=[100, 200])
    assert [schedule(e) for e in (0, 99, 100, 199, 200)] == [1, 1, 0.5, 0.5, 0.25]
    assert [StepDecay(1.0, 0.5, every=100)(e) for e in (99, 100, 101)] == [1, 0.5, 0.5]


@seeded
@given(steps=st.integers(1, 40), batch=st.integers(1, 9), start=st.sampled_from([0.0, 0.05, 0.4]))
def test_warm_up_adds_the_same_to_the_rate_at_every_step_and_then_follows_its_schedule(
    steps, batch, start
):
    # Goyal et al. 2017, section 2.2: "increment it by a constant amount at each iteration".
    schedule = WarmUp(Constant(0.4), examples=steps * batch, start=start)
    rate, rates = start, []
    for _ in range(steps + 5):
        rates.append(min(rate, 0.4))
        rate += (0.4 - start) / steps
    got = [schedule(step * batch) for step in range(steps + 5)]
    # Tolerance: 40 sums, rounded once each.
    np.testing.assert_allclose(got, rates, rtol=0, atol=1e-14)


def test_after_warm_up_the_rate_is_that_of_the_schedule_alone():
    decay = StepDecay(0.8, 0.1, at=(50, 100))
    schedule = WarmUp(decay, examples=80)
    assert [schedule(e) for e in (80, 99, 100, 1000)] == [decay(e) for e in (80, 99, 100, 1000)]
    assert schedule(25) == 0.8 * 25 / 80
    assert schedule(60) == decay(60) * 60 / 80


# Rates that Caffe prints for examples/mnist/lenet_solver.prototxt: base_lr 0.01, policy inv,
# gamma 0.0001, power 0.75, batches of 64; six digits.
CAFFE = {0: 0.01, 100: 0.00992565, 200: 0.00985258, 5000: 0.00737788, 9900: 0.00596843}


def test_inverse_gives_the_rates_that_caffe_prints():
    schedule = Inverse(0.01, gamma=0.0001, power=0.75, every=64)
    for iteration, printed in CAFFE.items():
        # Tolerance: half of the last digit printed.
        assert schedule(64 * iteration) == pytest.approx(printed, abs=5e-9)


def test_what_caffe_prints_tells_another_formula_and_another_count_apart():  # the control
    printed = CAFFE[5000]
    assert abs(0.01 / (1 + 0.75 * 0.0001 * 5000) - printed) > 1e-5
    assert abs(Inverse(0.01, 0.0001, 0.75, every=1)(64 * 5000) - printed) > 1e-3
    assert abs(Inverse(0.01, 0.0001, 0.75, every=64)(5000) - printed) > 1e-3


def by_torch(make, steps, lr=0.3):
    """Rates of a scheduler of torch's, which goes from each step's rate to the next."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@seeded
@given(steps=st.integers(1, 40), batch=st.integers(1, 9), factor=st.sampled_from([0.1, 0.9, 2.0]))
def test_exponential_is_the_product_of_a_factor_a_step(steps, batch, factor):
    each = factor ** (1 / steps)
    expected = by_torch(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, each), steps + 5)
    schedule = Exponential(0.3, factor, every=steps * batch)
    got = [schedule(step * batch) for step in range(steps + 5)]
    # Tolerance: up to 45 factors, each rounded, against one power.
    np.testing.assert_allclose(got, expected, rtol=1e-13)


@seeded
@given(every=st.integers(1, 30), factor=st.sampled_from([0.1, 0.5, 0.97]))
def test_exponential_on_a_staircase_drops_once_every_so_many_examples(every, factor):
    schedule = Exponential(0.3, factor, every, staircase=True)
    expected = by_loop(0.3, factor, range(every, 101, every), 100)
    # Tolerance: up to 100 factors, rounded once each, against one power.
    np.testing.assert_allclose([schedule(e) for e in range(101)], expected, rtol=1e-13)


def test_a_staircase_and_a_slope_meet_at_its_steps_alone():  # the control of the two above
    stairs, slope = (Exponential(0.3, 0.5, 10, staircase=s) for s in (True, False))
    assert [e for e in range(31) if stairs(e) == slope(e)] == [0, 10, 20, 30]


@seeded
@given(steps=st.integers(2, 40), batch=st.integers(1, 9), end=st.sampled_from([0.0, 0.05, 0.4]))
def test_cosine_follows_the_recursion_of_torch_and_then_stays(steps, batch, end):
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = by_torch(lambda o: annealing(o, T_max=steps, eta_min=end), steps + 1)
    schedule = Cosine(0.3, examples=steps * batch, end=end)
    got = [schedule(step * batch) for step in range(steps + 1)]
    # Tolerance: the recursion divides by 1 + cos(pi t), which is as small as 0.003 at 39/40.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert [schedule(steps * batch + more) for more in (0, 1, 10**9)] == [end] * 3


def test_the_recursion_tells_a_whole_wave_from_half_of_one():  # the control
    expected = by_torch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8), 9)
    whole_wave = [0.15 * (1 + math.cos(2 * math.pi * t / 8)) for t in range(9)]
    assert max(abs(a - b) for a, b in zip(whole_wave, expected, strict=True)) > 0.1


@pytest.mark.parametrize(
    "schedule",
    [Inverse(0.8, 0.1, 0.5, 10), Exponential(0.8, 0.5, 30), Cosine(0.8, 100), Constant(0.8)],
)
def test_warm_up_goes_before_any_schedule(schedule):
    warm = WarmUp(schedule, examples=50)
    assert [warm(e) for e in (50, 99, 1000)] == [schedule(e) for e in (50, 99, 1000)]
    assert [warm(e) for e in (0, 10)] == [0, schedule(10) * 10 / 50]


def test_a_schedule_means_the_same_at_another_batch_size():
    schedule = WarmUp(StepDecay(0.3, 0.5, every=512), examples=256, start=0.1)
    small, large = ([schedule(t * batch) for t in range(4096 // batch)] for batch in (32, 128))
    assert small[::4] == large


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-0.1), "Constant has lr=-0.1. It must be finite and at least 0"),
        (lambda: Constant(math.nan), "Constant has lr=nan. It must be finite and at least 0"),
        (lambda: Constant(math.inf), "Constant has lr=inf. It must be finite and at least 0"),
        (
            lambda: StepDecay(math.nan, every=5),
            "StepDecay has lr=nan. It must be finite and at least 0",
        ),
        (lambda: StepDecay(1.0, 0.0, every=5), "has factor=0.0. It must be finite and above 0"),
        (lambda: StepDecay(1.0, -1.0, every=5), "has factor=-1.0. It must be finite and above 0"),
        (
            lambda: StepDecay(1.0, math.nan, every=5),
            "has factor=nan. It must be finite and above 0",
        ),
        (lambda: StepDecay(1.0), "needs either every=examples or at="),
        (lambda: StepDecay(1.0, every=5, at=(3,)), "needs either every=examples or at="),
        (
            lambda: StepDecay(1.0, every=0),
            "every is 0. It must be a number of examples of at least 1",
        ),
        (
            lambda: StepDecay(1.0, every=1e5),
            "every is 100000.0. It must be a number of examples of at least 1",
        ),
        (lambda: StepDecay(1.0, at=(5, 3)), r"has at=\(5, 3\). The numbers must be ascending"),
        (lambda: StepDecay(1.0, at=(5, 5)), r"has at=\(5, 5\). The numbers must be ascending"),
        (
            lambda: StepDecay(1.0, at=(0, 5)),
            "an element of at is 0. It must be a number of examples",
        ),
        (
            lambda: Inverse(-1.0, 0.1, 0.5, 5),
            "Inverse has lr=-1.0. It must be finite and at least 0",
        ),
        (
            lambda: Inverse(1.0, -0.1, 0.5, 5),
            "Inverse has gamma=-0.1. It must be finite and at least 0",
        ),
        (
            lambda: Inverse(1.0, 0.1, math.inf, 5),
            "Inverse has power=inf. It must be finite and at least 0",
        ),
        (
            lambda: Inverse(1.0, 0.1, 0.5, 0),
            "every is 0. It must be a number of examples of at least 1",
        ),
        (
            lambda: Exponential(math.inf, 0.5, 5),
            "Exponential has lr=inf. It must be finite and at least 0",
        ),
        (
            lambda: Exponential(1.0, 0.0, 5),
            "Exponential has factor=0.0. It must be finite and above 0",
        ),
        (
            lambda: Exponential(1.0, 0.5, 2.5),
            "every is 2.5. It must be a number of examples of at least 1",
        ),
        (lambda: Cosine(-1.0, 5), "Cosine has lr=-1.0. It must be finite and at least 0"),
        (lambda: Cosine(1.0, 0), "Cosine: examples is 0. It must be a number"),
        (lambda: Cosine(1.0, 5, end=-0.1), "Cosine has end=-0.1. It must be finite and at least 0"),
        (
            lambda: WarmUp(Constant(1.0), 0),
            "examples is 0. It must be a number of examples of at least 1",
        ),
        (
            lambda: WarmUp(Constant(1.0), -3),
            "examples is -3. It must be a number of examples of at least 1",
        ),
        (
            lambda: WarmUp(Constant(1.0), True),
            "examples is True. It must be a number of examples of at least 1",
        ),
        (
            lambda: WarmUp(Constant(1.0), 5, start=-1.0),
            "start=-1.0. It must be finite and at least 0",
        ),
        (
            lambda: WarmUp(0.1, 5),
            r"WarmUp has schedule=0.1. It must be one such as Constant\(0.1\)",
        ),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
