"""Parts of benchmarks/scaling_rules.py against hand calculations and NumPy."""

import math
from collections.abc import Callable
from importlib import import_module
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anybatch.zoo import mlp
from rules_modules import Modules, load_modules, read_result

__all__ = ["load_modules"]


@pytest.fixture
def parts(load_modules: Callable[[str], Modules]) -> Modules:
    return load_modules("fashion_mnist")


def test_distance_leaves_out_the_first_epoch_and_is_infinite_after_divergence(
    parts: Modules,
) -> None:
    epochs = parts.common.EPOCHS
    reference = [{"train_loss": [1.0] * epochs}]
    twice = {"train_loss": [9.0] + [2.0] * (epochs - 1)}
    assert parts.verdicts.distance([twice], reference) == pytest.approx(math.log(2))
    half_and_two = [{"train_loss": [1.0] + [x] * (epochs - 1)} for x in (0.5, 1.5)]
    assert (
        parts.verdicts.distance(half_and_two, reference) == 0
    )  # of the mean curve, not the mean distance
    assert parts.verdicts.distance([{"train_loss": [1.0, 1.0]}], reference) == math.inf


def test_the_gap_is_interpolated_where_the_training_loss_reaches_a_value(parts: Modules) -> None:
    run = {
        "train_loss": [0.8, 0.4, 0.1],
        "test_loss": [0.8, 0.6, 0.5],
        "train_error": [0.3, 0.2, 0.0],
        "test_error": [0.3, 0.24, 0.2],
    }
    # 0.2 is half way from 0.4 to 0.1 by its logarithm: gaps 0.2 and 0.4, errors 0.04 and 0.2
    assert parts.verdicts.interpolate_gap(run, 0.2) == pytest.approx({"loss": 0.3, "error": 0.12})
    assert parts.verdicts.interpolate_gap(run, 0.05) is None


def test_recipes_are_converted_by_the_rules(parts: Modules) -> None:
    sgd, adamw = (parts.common.build_reference(name, 0.01) for name in ("sgd", "adamw"))
    linear = parts.batches.convert_recipe(sgd, "linear", 1024)  # k = 32
    assert linear.optimizer.lr == pytest.approx(0.32)
    assert (linear.schedule.warm_up, linear.schedule.warm_up_start) == (60_000, 0.01)
    assert parts.common.read_schedule(linear)(30_000) == pytest.approx((0.01 + 0.32) / 2)
    expected = {
        "rate as it is, decay k": (0.01, 32 * 0.3),
        "rate sqrt(k), decay sqrt(k)": (0.01 * 32**0.5, 0.3 * 32**0.5),
        "rate k, decay as it is": (0.32, 0.3),
        "rate sqrt(k), decay as it is": (0.01 * 32**0.5, 0.3),
        "rate as it is, decay as it is": (0.01, 0.3),
    }
    for rule, numbers in expected.items():
        optimizer = parts.batches.convert_recipe(adamw, rule, 1024).optimizer
        assert (optimizer.lr, optimizer.args["weight_decay"]) == pytest.approx(numbers)
    assert set(expected) == set(parts.batches.RULES["adamw"])


def test_warm_ups_differ_only_in_the_first_epoch(parts: Modules) -> None:
    schedules = {arm: parts.warmup.build_schedule(arm, 0.01, 32.0) for arm in parts.warmup.ARMS}
    at_half = {arm: schedule(30_000) for arm, schedule in schedules.items()}
    assert at_half == pytest.approx(
        {
            "gradual": 0.165,
            "constant": 0.01,
            "no warm-up": 0.32,
            "square root": 0.01 * 32**0.5,
            "unscaled": 0.01,
        }
    )
    for arm in ("gradual", "constant", "no warm-up"):
        assert [schedules[arm](60_000 * e) for e in (1, 5, 8)] == pytest.approx(
            [0.32, 0.032, 0.0032]
        )


def test_minima_are_the_roots_of_the_derivative(parts: Modules) -> None:
    for penalty in parts.minima.PENALTIES:
        every = np.roots([1, 0, -(1 - penalty), parts.minima.TILT])  # by eigenvalues
        real = np.sort(every[np.abs(every.imag) < 1e-9].real)
        assert parts.minima.find_roots(penalty) == pytest.approx(real, abs=1e-9)
    assert [len(parts.minima.find_roots(penalty)) for penalty in parts.minima.PENALTIES] == [
        3,
        3,
        1,
    ]


def test_plain_descent_takes_what_starts_below_the_barrier(
    parts: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.minima, "NUM_UPDATES", 300)
    share = parts.minima.run_job(256, 0.0, "uniform", "SGD")["below"]
    generator = torch.Generator().manual_seed(0)
    torch.randn(256, parts.minima.NUM_RUNS, generator=generator)  # the noise, drawn first
    start = torch.rand(parts.minima.NUM_RUNS, generator=generator) * 4 - 2
    barrier = np.sort(np.roots([1, 0, -1, 0.2]).real)[1]
    assert share == pytest.approx(float((start < barrier).float().mean()))
    assert share < parts.minima.run_job(1, 0.0, "uniform", "SGD")["below"]  # control: noise


def test_the_fit_recovers_the_hyperbola_of_its_points(parts: Modules) -> None:
    points = [(b, 50 * (1 + 300 / b)) for b in (1, 8, 64, 512, 4096)]
    fit = parts.hyperbola.fit_curve(points)
    assert (fit.s_min, fit.b_crit) == pytest.approx((50, 300), rel=1e-6)
    # E = S B, E_min = S_min B_crit: the form of the paper
    for b, s in points:
        product = (s / fit.s_min - 1) * (s * b / (fit.s_min * fit.b_crit) - 1)
        assert product == pytest.approx(1, rel=1e-4)
    wrong = parts.hyperbola.fit_minimum(100, points)  # control
    assert max(abs(math.log(s / wrong.steps(b))) for b, s in points) > 0.3


def test_fieller_intervals_end_where_the_difference_is_t_standard_errors(parts: Modules) -> None:
    rng = np.random.default_rng(0)
    below = rng.normal(1.0, 0.5, 40)
    above = 3 * below + rng.normal(0.0, 0.5, 40)
    low, high = parts.noise.fieller_interval(above.tolist(), below.tolist(), 2.0)
    for ratio in (low, high):
        difference = above - ratio * below
        errors = difference.std(ddof=1) / math.sqrt(40)
        assert abs(difference.mean()) == pytest.approx(2.0 * errors, rel=1e-9)
    assert low < above.mean() / below.mean() < high
    unresolved = rng.normal(0.0, 1.0, 40)
    assert parts.noise.fieller_interval(above.tolist(), unresolved.tolist(), 2.0)[1] == math.inf


def test_noise_scales_are_those_of_single_gradients(
    parts: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, num = mlp(inputs=[6], hidden=[5], classes=3), 64
    data = torch.randn(num, 6), torch.arange(num) % 3
    monkeypatch.setattr(parts.noise, "load_examples", lambda part: data)
    monkeypatch.setattr(parts.noise, "FULL", num)
    rows = []
    for x, y in zip(*data, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    each = torch.stack(rows).double()
    trace = float(each.var(0).sum())  # divisor n - 1
    square = float(each.mean(0).square().sum()) - trace / num
    assert parts.noise.estimate_by_brute_force(model) == pytest.approx(
        trace / square, rel=1e-4
    )  # float32
    monkeypatch.setattr(parts.noise, "NUM_BATCHES", 1)  # of all examples, in parts of 16
    monkeypatch.setattr(parts.noise, "LARGE", num)
    ledger = parts.noise.estimate_by_ledger(model, 0)
    assert (ledger.variance, ledger.gradient_square) == pytest.approx((trace, square), rel=1e-4)


def test_a_crossing_lies_on_the_line_between_two_measurements(parts: Modules) -> None:
    target = parts.target.TARGET
    assert parts.target._interpolate_crossing(
        (100, 2 * target), (400, target / 2)
    ) == pytest.approx(200)
    assert parts.target._interpolate_crossing((0, math.inf), (1, target / 2)) == 1
    assert list(parts.common.space_looks(9, 1.5)) == [1, 2, 3, 4, 6, 9]


def test_a_plot_is_xml_with_each_point_in_its_place(parts: Modules) -> None:
    svg = import_module("svg")
    x, y = svg.Axis("a < b", (1, 100), is_log=True), svg.Axis("y", (0, 10))
    text = svg.plot("title", x, y, [svg.Series("s", [(10, 5), (1000, 10)], 0, marks=True)])
    marks = ElementTree.fromstring(text).findall("{*}circle")
    centres = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in marks]
    across = (svg.LEFT + svg.WIDTH - svg.RIGHT) / 2  # halfway by the logarithm
    assert centres[0] == ((across), (svg.TOP + svg.HEIGHT - svg.BOTTOM) / 2)
    assert centres[1] == (svg.WIDTH - svg.RIGHT, svg.TOP)  # beyond the last tick: on the edge


def test_a_size_that_misses_the_target_has_no_steps_and_is_not_fitted(parts: Modules) -> None:
    raw = read_result("fashion_mnist")
    tables = parts.tables.format_tables(raw)["steps"]
    assert "not reached" not in tables  # control
    next(run for run in raw["steps"]["runs"] if run["size"] == 8)["updates"] = None
    assert 8 not in dict(parts.tables.fit_steps(raw)[0])
    assert (
        "| 8 | 0.0312 | not reached by all seeds | | | |"
        in parts.tables.format_tables(raw)["steps"]
    )
