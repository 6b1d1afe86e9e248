"""Steps-examples hyperbola, and the plan that follows from it."""

import math

import numpy as np
import pytest

from anybatch.advice.hyperbola import Tradeoff, fit_hyperbola
from anybatch.advice.measure import Point
from anybatch.advice.plan import Plan, split_stretches
from anybatch.advice.reasons import list_reasons, make_table, recommend
from anybatch.advice.speed import Speed, choose_micro_batch, predict_seconds

BATCHES = [1, 4, 16, 64, 256, 1024]


@pytest.mark.parametrize("batch", [1, 3.5, 64, 2**20])
def test_steps_and_examples_lie_on_the_hyperbola(batch):
    t = Tradeoff(least_steps=100, least_examples=5000)
    s, e = t.steps(batch), t.examples(batch)
    # Tolerances: a few operations in float64; close to a branch 1 is subtracted from almost 1.
    assert e == pytest.approx(batch * s, rel=1e-14)
    assert (s / 100 - 1) * (e / 5000 - 1) == pytest.approx(1, rel=1e-9)


def test_at_the_critical_batch_both_are_twice_their_least_and_the_limits_are_the_least():
    t = Tradeoff(least_steps=100, least_examples=5000)
    assert t.critical == 50
    assert (t.steps(50), t.examples(50)) == (200, 10_000)
    assert t.steps(1e12) == pytest.approx(100, rel=1e-9)
    assert t.examples(1e-9) == pytest.approx(5000, rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.5, 40.0, 1e9, math.inf])
def test_the_hyperbola_passes_through_its_run_with_the_noise_as_critical_batch(noise):
    t = fit_hyperbola([(200, noise), (100, noise)], 64)
    assert t.steps(64) == pytest.approx(300, rel=1e-12)
    assert t.critical == pytest.approx(noise, rel=1e-12)


def test_without_noise_steps_stay_and_with_nothing_else_examples_stay():
    silent, noisy = fit_hyperbola([(300, 0.0)], 64), fit_hyperbola([(300, math.inf)], 64)
    assert [silent.steps(b) for b in (1, 4096)] == [300, 300]
    assert [noisy.examples(b) for b in (1, 4096)] == [300 * 64, 300 * 64]


def updates(batch: int, noise) -> tuple[int, list[float]]:
    """Updates until 1 is reached, each of progress 0.001 / (1 + noise / batch), as in the source's
    section 2.2; and the noise scale at each."""
    done, calls = 0.0, []
    while done < 1:
        calls.append(noise(done))
        done += 0.001 / (1 + noise(done) / batch)
    return len(calls), calls


@pytest.mark.parametrize("ours", [8, 64, 512])
def test_a_run_at_one_batch_size_tells_the_steps_of_all(ours):
    """Oracle: a loop over updates whose noise scale grows from 10 to 1,000.

    Tolerance: 2 %, for a run of 1,000 updates or more that is looked at in 200 places.
    Control: the plain mean of the noise over the updates, whose weight is not its progress.
    """

    def noise(done: float) -> float:
        return 10 * 100**done

    steps, calls = updates(ours, noise)
    count = 200
    looks = [(steps / count, calls[int((k + 0.5) * steps / count)]) for k in range(count)]
    t = fit_hyperbola(looks, ours)
    wrong = fit_hyperbola([(steps, float(np.mean(calls)))], ours)
    misses = []
    for batch in BATCHES:
        expected, _ = updates(batch, noise)
        assert t.steps(batch) == pytest.approx(expected, rel=0.02)
        misses.append(abs(wrong.steps(batch) / expected - 1))
    assert max(misses) > 0.1


def quadratic(batch: int, rate: float) -> tuple[int, list[float]]:
    """SGD on sum h_i w_i^2 / 2 with gradient noise of variance h_i / B, exact in expectation:
    updates to a twentieth of the loss, and tr(S) / |G|^2 before each."""
    h = np.logspace(0, -2, 100)
    second, calls = np.ones(100), []  # E w_i^2
    while (h * second).sum() > 0.05 * h.sum():
        calls.append(float(h.sum() / (h * h * second).sum()))
        second = (1 - rate * h) ** 2 * second + rate**2 * h / batch
        if len(calls) > 3000 or second.max() > 1e3:
            return 10**9, calls  # this rate never gets there
    return len(calls), calls


def fastest(batch: int) -> tuple[int, list[float]]:
    """Train at the best constant rate of a fine grid."""
    return min(
        (quadratic(batch, float(r)) for r in np.logspace(-1.6, 0.29, 40)), key=lambda x: x[0]
    )


@pytest.mark.slow
def test_a_noisy_quadratic_at_its_best_rates_takes_the_steps_that_one_run_predicts():
    """Tolerance: a factor of 1.5 where steps differ by more than 50: the theory looks at one update
    at a time with a rate of its own, this is a whole run at one rate.

    Controls: to take the same examples at each batch size is off by more, and so is the same steps.
    """
    ours = 16
    steps, calls = fastest(ours)
    t = fit_hyperbola([(steps / 10, calls[int((k + 0.5) * steps / 10)]) for k in range(10)], ours)
    actual = {batch: fastest(batch)[0] for batch in BATCHES}
    assert actual[1] > 50 * actual[1024]
    for batch, expected in actual.items():
        assert 1 / 1.5 < t.steps(batch) / expected < 1.5
    assert actual[1024] > 1.5 * steps * ours / 1024
    assert actual[1] > 1.5 * steps


def test_the_hyperbola_ends_where_the_noise_of_a_finite_data_set_does():
    """At B of D examples the variance of a batch's gradient is tr(S) (1/B - 1/D), by brute force
    over all pairs of 4 examples in one dimension; |G|^2 + tr(S)/B is |g_D|^2 plus that.

    Tolerance: a few operations in float64. Control: tr(S)/B alone."""
    gradients = np.array([1.0, 2.0, 4.0, 9.0])
    pairs = [(a + b) / 2 for i, a in enumerate(gradients) for b in gradients[i + 1 :]]
    trace, of_all = gradients.var(ddof=1), gradients.mean() ** 2
    assert np.var(pairs) == pytest.approx(trace * (1 / 2 - 1 / 4), rel=1e-12)
    assert np.var(pairs) != pytest.approx(trace / 2, rel=0.1)
    square = of_all - trace / 4
    t = fit_hyperbola([(100, trace / square)], 2)
    # Steps go with the mean square of a batch's gradient.
    mean_square = np.mean(np.square(pairs))
    assert t.steps(4) / t.steps(2) == pytest.approx(of_all / mean_square, rel=1e-12)


def test_each_point_stands_for_the_steps_that_are_nearest_to_it():
    points = [point(10, 1.0), point(30, 2.0), point(100, 3.0)]
    result = split_stretches(points, 200, lambda p: p.noise)
    assert result == [(20.0, 1.0), (45.0, 2.0), (135.0, 3.0)]
    assert split_stretches(points[:1], 200, lambda p: p.noise) == [(200.0, 1.0)]


def point(step, noise, low=None, high=None):
    low, high = (noise / 2 if low is None else low), (noise * 2 if high is None else high)
    return Point(step=step, noise=noise, low=low, high=high, examples=1000)


def speed(micro_batch, seconds):
    return Speed(micro_batch=micro_batch, seconds=seconds, peak_bytes=1000 * micro_batch)


SPEEDS = [speed(1, 0.010), speed(2, 0.010), speed(4, 0.012), speed(8, 0.024)]


@pytest.mark.parametrize(
    ("batch", "micro_batch", "seconds"),
    [(1, 1, 0.010), (3, 2, 0.020), (4, 4, 0.012), (8, 4, 0.024), (9, 4, 0.036), (100, 4, 0.300)],
)
def test_an_update_takes_the_fastest_passes(batch, micro_batch, seconds):
    assert choose_micro_batch(SPEEDS, batch).micro_batch == micro_batch
    # Tolerance: a product in float64.
    assert predict_seconds(SPEEDS, 0.5, batch) == pytest.approx(0.5 + seconds, rel=1e-12)


def small_plan(**changed):
    argument = {
        "points": [point(500, 50.0)],
        "speeds": SPEEDS,
        "optimizer_seconds": 0.001,
        "steps": 1000,
        "batch": 16,
        "num_examples": 5000,
        "price_per_hour": 3.6,
    }
    return Plan(**(argument | changed))


def test_a_plan_has_powers_of_two_and_the_full_data_set():
    assert small_plan().batches == [*(2**k for k in range(13)), 5000]
    assert small_plan(num_examples=4096).batches[-2:] == [2048, 4096]
    assert small_plan(num_examples=10**7).batches[-2:] == [2**20, 10**7]


def test_a_row_says_steps_examples_time_and_cost():
    """By hand: Smin = 1000 / (1 + 50/16), S(4) = Smin (1 + 50/4), an update of 4 takes 0.013 s, and
    a second costs 0.001. The noise may be 25/8 to 100/0.05. Tolerance: a few operations."""
    row = small_plan().predict(4)
    steps = 1000 / (1 + 50 / 16) * (1 + 50 / 4)
    assert row.steps.value == pytest.approx(steps, rel=1e-12)
    assert row.examples.value == pytest.approx(4 * steps, rel=1e-12)
    assert row.seconds.value == pytest.approx(steps * 0.013, rel=1e-12)
    assert row.cost.value == pytest.approx(steps * 0.013 * 0.001, rel=1e-12)
    ends = [1000 / (1 + b / 16) * (1 + b / 4) for b in (25 / 8, 100 / 0.05)]
    assert (row.steps.low, row.steps.high) == pytest.approx(sorted(ends), rel=1e-12)
    assert (row.micro_batch, row.peak_bytes) == (4, 4000)


def test_the_recipes_own_batch_size_takes_its_own_steps_whatever_the_noise():
    row = small_plan().predict(16)
    for result in (row.steps.low, row.steps.value, row.steps.high):
        assert result == pytest.approx(1000, rel=1e-12)


def test_a_range_is_advised_and_it_widens_with_what_is_not_known():
    plan = small_plan()
    (smallest, largest), (low, high) = plan.recommendation, plan.widest_recommendation
    subset = {batch: plan.predict(batch).seconds.value for batch in plan.batches}
    best = min(subset.values())
    fast = [batch for batch in subset if subset[batch] <= 1.25 * best]
    assert (smallest, largest) == (fast[0], fast[-1])
    assert low <= smallest < largest <= high
    assert (low, high) != (smallest, largest)
    assert f"{smallest:,} to {largest:,} examples" in recommend(plan)
    assert f"{low:,} to {high:,}" in recommend(plan)


def test_what_is_advised_ends_where_a_slow_size_lies_between(monkeypatch):
    seconds = {1: 1.0, 2: 0.9, 4: 1.0, 8: 9.0, 16: 0.95}
    monkeypatch.setattr(Plan, "_predict_seconds", lambda plan, tradeoff, batch: seconds[batch])
    assert small_plan(num_examples=16).recommendation == (1, 4)


def test_what_is_advised_is_never_one_batch_size_alone():
    """A machine on which all but 4 at a time take ten times as long by example."""
    sharp = [speed(size, size if size != 4 else 0.4) for size in (1, 2, 4, 8, 16)]
    plan = small_plan(speeds=sharp, num_examples=16, points=[point(500, 1e-6)])
    subset = [plan.predict(batch).seconds.value for batch in plan.batches]
    assert sorted(subset)[1] > 1.25 * min(subset)
    assert plan.recommendation[0] < plan.batches[subset.index(min(subset))] < plan.recommendation[1]


def test_more_noise_makes_larger_batches_worth_while():
    quiet, loud = (small_plan(points=[point(500, b)]) for b in (1.0, 1000.0))
    assert quiet.recommendation[1] < loud.recommendation[1]
    assert quiet.critical.value == pytest.approx(1, rel=1e-12)  # as for all hyperbolas above
    assert loud.critical.low == pytest.approx(500 / 8, rel=1e-12)
    assert loud.critical.high == pytest.approx(2000 / 0.05, rel=1e-12)


def test_the_reasons_say_how_far_the_plan_can_be_trusted():
    early = " ".join(list_reasons(small_plan(points=[point(100, 50.0)])))
    assert "Only the first 100 of 1,000 updates" in early
    assert "0.05 to 8 times" in early
    assert "anybatch scale" in early
    late = " ".join(list_reasons(small_plan(points=[point(900, 50.0), point(1000, 60.0)])))
    assert "measured from update 900 of 1,000 on" in late
    endless = small_plan(points=[point(500, math.inf, 40.0, math.inf)])
    text = " ".join(list_reasons(endless))
    assert "does not stand out from the noise of 1,000 examples" in text
    assert "ends before the critical batch size" in text
    assert endless.critical.high == math.inf
    assert all(math.isfinite(endless.predict(b).seconds.high) for b in endless.batches)


def test_the_table_ends_with_the_full_data_set_and_has_costs_only_at_a_price():
    plan = small_plan()
    rows = make_table([plan.predict(batch) for batch in plan.batches])
    assert [row["batch"] for row in rows][-2:] == ["4,096", "5,000 (all)"]
    assert "cost" in rows[0]
    free = small_plan(price_per_hour=None)
    assert "cost" not in make_table([free.predict(4)])[0]
