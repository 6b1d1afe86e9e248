"""Schedules against plain loops over the examples; they are counted in examples, not in steps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.errors import RecipeError
from anybatch.schedules import Constant, StepDecay, WarmUp

seeded = settings(derandomize=True, deadline=None, max_examples=50)


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


def test_a_schedule_means_the_same_at_another_batch_size():
    schedule = WarmUp(StepDecay(0.3, 0.5, every=512), examples=256, start=0.1)
    small, large = ([schedule(t * batch) for t in range(4096 // batch)] for batch in (32, 128))
    assert small[::4] == large


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-0.1), "Constant expects a finite lr of at least 0, got -0.1"),
        (lambda: Constant(math.nan), "Constant expects a finite lr of at least 0, got nan"),
        (lambda: Constant(math.inf), "Constant expects a finite lr of at least 0, got inf"),
        (lambda: StepDecay(math.nan, every=5), "StepDecay expects a finite lr .* got nan"),
        (lambda: StepDecay(1.0, 0.0, every=5), "finite factor above 0, got 0.0"),
        (lambda: StepDecay(1.0, -1.0, every=5), "finite factor above 0, got -1.0"),
        (lambda: StepDecay(1.0, math.nan, every=5), "finite factor above 0, got nan"),
        (lambda: StepDecay(1.0), "expects either every=examples or at="),
        (lambda: StepDecay(1.0, every=5, at=(3,)), "expects either every=examples or at="),
        (lambda: StepDecay(1.0, every=0), "every to be a number of examples of at least 1, got 0"),
        (lambda: StepDecay(1.0, every=1e5), "every to be a number of examples .* got 100000.0"),
        (lambda: StepDecay(1.0, at=(5, 3)), r"at in ascending order, got \(5, 3\)"),
        (lambda: StepDecay(1.0, at=(5, 5)), r"at in ascending order, got \(5, 5\)"),
        (lambda: StepDecay(1.0, at=(0, 5)), "each of at to be a number of examples .* got 0"),
        (lambda: WarmUp(Constant(1.0), 0), "examples to be a number .* at least 1, got 0"),
        (lambda: WarmUp(Constant(1.0), -3), "examples to be a number .* at least 1, got -3"),
        (lambda: WarmUp(Constant(1.0), True), "examples to be a number .* at least 1, got True"),
        (lambda: WarmUp(Constant(1.0), 5, start=-1.0), "finite start of at least 0, got -1.0"),
        (lambda: WarmUp(0.1, 5), r"WarmUp expects a schedule such as Constant\(0.1\), got 0.1"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
