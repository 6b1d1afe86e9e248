"""docs/scaling-rules.md: what its raw result gives, in words that follow from the figures."""

import json
import math
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anybatch.zoo import mlp
from rules_modules import Modules, forget

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RAW = json.loads((ROOT / "benchmarks" / "results" / "scaling_rules.json").read_text())


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield Modules()
    forget()


def losses(runs: list[Any], rule: str | None, size: int, seeds: range) -> Any:
    """Training losses [seeds, epochs] of a raw result, by NumPy alone."""
    own = [run for run in runs if (run["rule"], run["size"]) == (rule, size)]
    return np.array([run["train_loss"] for run in own if run["seed"] in seeds])


def distance(a: Any, b: Any) -> float:
    return float(np.abs(np.log(a.mean(0)) - np.log(b.mean(0)))[1:].mean())


def test_the_document_and_its_plots_are_what_the_raw_result_gives(parts: Modules) -> None:
    document = (DOCS / "scaling-rules.md").read_text(encoding="utf8")
    assert document == parts.document_sections.text_from(RAW)
    plots = parts.document_sections.plots(RAW)
    for name, text in plots.items():
        assert (DOCS / "scaling-rules" / f"{name}.svg").read_text(encoding="utf8") == text
    changed = json.loads(json.dumps(RAW))  # control
    for run in changed["batches"]["runs"]:
        if run["rule"] == "linear":
            run["train_loss"] = [2 * loss for loss in run["train_loss"]]
    assert document != parts.document_sections.text_from(changed)
    assert plots["sgd"] != parts.document_sections.plots(changed)["sgd"]


def test_the_raw_result_is_of_the_protocol_as_it_is(parts: Modules) -> None:
    parts_of = import_module("scaling_rules").PARTS
    for name, module in parts_of.items():
        asked = module.jobs(RAW)
        made = RAW[name]["runs"]
        assert [
            {key: run[key] for key in job} for job, run in zip(asked, made, strict=True)
        ] == asked
    assert parts.batches.jobs(RAW) != parts.warmup.jobs(RAW)  # control


@pytest.mark.parametrize("study", ["sgd", "smaller", "adamw"])
def test_each_verdict_on_a_rule_follows_from_the_losses(parts: Modules, study: str) -> None:
    optimizer, title = parts.document_carried.STUDIES[study]
    runs = RAW["smaller" if study == "smaller" else "batches"]["runs"]
    runs = [run for run in runs if run["optimizer"] == optimizer]
    document = (DOCS / "scaling-rules.md").read_text(encoding="utf8")
    table = document.split(f"| {title}: distance at |")[1].split("![")[0]
    reference = losses(runs, None, 32, range(5))
    itself = distance(losses(runs, None, 32, range(5, 10)), reference)
    assert f"The reference is {itself:.3f} from itself." in table
    assert itself < parts.verdicts.TOLERANCE / 2  # the criterion can tell what it is to tell
    seen = set()
    for rule in parts.batches.RULES[optimizer]:
        row = re.search(rf"^\| {re.escape(rule)} \| (.*) \|$", table, re.M)
        assert row is not None
        for cell, size in zip(row[1].split(" | "), parts.batches.SIZES, strict=True):
            own = [run for run in runs if (run["rule"], run["size"]) == (rule, size)]
            if min(len(run["train_loss"]) for run in own) < parts.common.EPOCHS:
                assert cell == "diverges"
                continue
            found = distance(losses(runs, rule, size, range(5)), reference)
            assert cell == f"{found:.2f} {'holds' if found <= 0.10 else 'breaks'}"
            seen.add(cell.split()[1])
    assert seen == {"holds", "breaks"}


def test_distance_leaves_out_the_first_epoch_and_has_no_end_after_divergence(
    parts: Modules,
) -> None:
    epochs = parts.common.EPOCHS
    reference = [{"train_loss": [1.0] * epochs}]
    twice = {"train_loss": [9.0] + [2.0] * (epochs - 1)}
    assert parts.verdicts.distance([twice], reference) == pytest.approx(math.log(2))
    half_and_two = [{"train_loss": [1.0] + [x] * (epochs - 1)} for x in (0.5, 1.5)]
    assert parts.verdicts.distance(half_and_two, reference) == 0  # of the mean, not the mean of
    assert parts.verdicts.distance([{"train_loss": [1.0, 1.0]}], reference) == math.inf


def test_the_gap_is_read_where_the_training_loss_is_met(parts: Modules) -> None:
    run = {
        "train_loss": [0.8, 0.4, 0.1],
        "test_loss": [0.8, 0.6, 0.5],
        "train_error": [0.3, 0.2, 0.0],
        "test_error": [0.3, 0.24, 0.2],
    }
    # 0.2 is half way from 0.4 to 0.1 by its logarithm: gaps 0.2 and 0.4, errors 0.04 and 0.2
    assert parts.verdicts.gap(run, 0.2) == pytest.approx({"loss": 0.3, "error": 0.12})
    assert parts.verdicts.gap(run, 0.05) is None


def test_a_rule_that_holds_again_is_not_said_to_hold_up_to_there(parts: Modules) -> None:
    epochs, sizes = parts.common.EPOCHS, parts.batches.SIZES
    reference = [{"train_loss": [1.0] * epochs}]

    def said(*loss: float) -> str:
        found = {
            ("it", s): [{"train_loss": [x] * epochs}] for s, x in zip(sizes, loss, strict=True)
        }
        return str(parts.document_carried._where("it", found, reference))

    assert said(1, 1, 1, 1) == "- *it* holds at every size."
    assert said(2, 2, 2, 2) == "- *it* breaks at 256 already."
    assert said(1, 1.05, 2, 2) == "- *it* holds up to 1,024 and breaks at 4,096."
    assert said(1, 2, 1, 2) == "- *it* holds up to 256 and breaks at 1,024, and again at 4,096."


def test_what_is_carried_is_what_the_rules_say(parts: Modules) -> None:
    sgd, adamw = (parts.common.reference(name, 0.01) for name in ("sgd", "adamw"))
    linear = parts.batches.carried(sgd, "linear", 1024)  # k = 32
    assert linear.optimizer.lr == pytest.approx(0.32)
    assert (linear.schedule.warm_up, linear.schedule.warm_up_start) == (60_000, 0.01)
    assert parts.common.warmed_up(linear)(30_000) == pytest.approx((0.01 + 0.32) / 2)
    expected = {
        "rate as it is, decay k": (0.01, 32 * 0.3),
        "rate sqrt(k), decay sqrt(k)": (0.01 * 32**0.5, 0.3 * 32**0.5),
        "rate k, decay as it is": (0.32, 0.3),
        "rate sqrt(k), decay as it is": (0.01 * 32**0.5, 0.3),
        "rate as it is, decay as it is": (0.01, 0.3),
    }
    for rule, numbers in expected.items():
        optimizer = parts.batches.carried(adamw, rule, 1024).optimizer
        assert (optimizer.lr, optimizer.args["weight_decay"]) == pytest.approx(numbers)
    assert set(expected) == set(parts.batches.RULES["adamw"])


def test_warm_ups_differ_in_the_first_epoch_alone(parts: Modules) -> None:
    schedules = {arm: parts.warmup.schedule_of(arm, 0.01, 32.0) for arm in parts.warmup.ARMS}
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
        assert parts.minima.roots(penalty) == pytest.approx(real, abs=1e-9)
    assert [len(parts.minima.roots(penalty)) for penalty in parts.minima.PENALTIES] == [3, 3, 1]


def test_plain_descent_takes_what_starts_below_the_barrier(
    parts: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.minima, "NUM_UPDATES", 300)
    found = parts.minima.run(256, 0.0, "uniform", "SGD")["below"]
    generator = torch.Generator().manual_seed(0)
    torch.randn(256, parts.minima.NUM_RUNS, generator=generator)  # the noise, drawn first
    start = torch.rand(parts.minima.NUM_RUNS, generator=generator) * 4 - 2
    barrier = np.sort(np.roots([1, 0, -1, 0.2]).real)[1]
    assert found == pytest.approx(float((start < barrier).float().mean()))
    assert found < parts.minima.run(1, 0.0, "uniform", "SGD")["below"]  # control: noise


def test_the_hyperbola_that_made_the_points_is_found(parts: Modules) -> None:
    points = [(b, 50 * (1 + 300 / b)) for b in (1, 8, 64, 512, 4096)]
    fit = parts.hyperbola.fitted(points)
    assert (fit.s_min, fit.b_crit) == pytest.approx((50, 300), rel=1e-6)
    # E = S B, E_min = S_min B_crit: the form of the paper
    for b, s in points:
        product = (s / fit.s_min - 1) * (s * b / (fit.s_min * fit.b_crit) - 1)
        assert product == pytest.approx(1, rel=1e-4)
    wrong = parts.hyperbola.with_critical(100, points)  # control
    assert max(abs(math.log(s / wrong.steps(b))) for b, s in points) > 0.3


def test_fieller_ends_where_the_difference_is_t_standard_errors(parts: Modules) -> None:
    rng = np.random.default_rng(0)
    below = rng.normal(1.0, 0.5, 40)
    above = 3 * below + rng.normal(0.0, 0.5, 40)
    low, high = parts.noise.fieller(above.tolist(), below.tolist(), 2.0)
    for ratio in (low, high):
        difference = above - ratio * below
        errors = difference.std(ddof=1) / math.sqrt(40)
        assert abs(difference.mean()) == pytest.approx(2.0 * errors, rel=1e-9)
    assert low < above.mean() / below.mean() < high
    unresolved = rng.normal(0.0, 1.0, 40)
    assert parts.noise.fieller(above.tolist(), unresolved.tolist(), 2.0)[1] == math.inf


def test_the_noise_scales_are_those_of_gradients_taken_one_by_one(
    parts: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, num = mlp(inputs=[6], hidden=[5], classes=3), 64
    data = torch.randn(num, 6), torch.arange(num) % 3
    monkeypatch.setattr(parts.noise, "examples", lambda part: data)
    monkeypatch.setattr(parts.noise, "FULL", num)
    rows = []
    for x, y in zip(*data, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    each = torch.stack(rows).double()
    trace = float(each.var(0).sum())  # divisor n - 1
    square = float(each.mean(0).square().sum()) - trace / num
    assert parts.noise.brute_force(model) == pytest.approx(trace / square, rel=1e-4)  # float32
    monkeypatch.setattr(parts.noise, "NUM_BATCHES", 1)  # of all examples, in parts of 16
    monkeypatch.setattr(parts.noise, "LARGE", num)
    ledger = parts.noise.ledger(model, 0)
    assert (ledger.variance, ledger.gradient_square) == pytest.approx((trace, square), rel=1e-4)


def test_a_crossing_lies_on_the_line_between_two_looks(parts: Modules) -> None:
    target = parts.target.TARGET
    assert parts.target._crossing((100, 2 * target), (400, target / 2)) == pytest.approx(200)
    assert parts.target._crossing((0, math.inf), (1, target / 2)) == 1
    assert list(parts.common.growing(9, 1.5)) == [1, 2, 3, 4, 6, 9]


def test_a_plot_is_xml_with_each_point_in_its_place(parts: Modules) -> None:
    svg = import_module("svg")
    x, y = svg.Axis("a < b", (1, 100), is_log=True), svg.Axis("y", (0, 10))
    text = svg.plot("title", x, y, [svg.Series("s", [(10, 5), (1000, 10)], 0, marks=True)])
    marks = ElementTree.fromstring(text).findall("{*}circle")
    centres = [(float(mark.attrib["cx"]), float(mark.attrib["cy"])) for mark in marks]
    across = (svg.LEFT + svg.WIDTH - svg.RIGHT) / 2  # half way by the logarithm
    assert centres[0] == ((across), (svg.TOP + svg.HEIGHT - svg.BOTTOM) / 2)
    assert centres[1] == (svg.WIDTH - svg.RIGHT, svg.TOP)  # beyond the last tick: on the edge


def test_the_words_on_noise_and_steps_follow_from_the_figures(parts: Modules) -> None:
    document = (DOCS / "scaling-rules.md").read_text(encoding="utf8").replace("\n", " ")
    points = [p for r in RAW["noise"]["runs"] if r["what"] == "three ways" for p in r["points"]]
    missed = sum(
        not (p[way][1] or 0) <= p["brute force"] <= (p[way][2] or math.inf)
        for p in points
        for way in ("ledger", "two batches")
    )
    verdict = "agree" if missed <= 4 else "do not agree"
    assert f"With {missed} miss{'es' * (missed != 1)} of 30 the three {verdict}." in document
    table: dict[int, list[Any]] = {}
    for run in RAW["steps"]["runs"]:
        table.setdefault(run["size"], []).append(run["updates"])
    steps = np.array([np.mean(needed) for needed in table.values()])
    sizes = list(table)
    shape = np.log(1 + np.arange(1, 3000, 0.5)[:, None] / np.array(sizes))  # B_crit by trial
    left = np.log(steps) - shape
    left -= left.mean(1, keepdims=True)
    best = (left**2).sum(1).argmin()
    off = float(np.abs(left[best]).max())
    assert f"B_crit = {1 + best / 2:,.0f} examples" in document
    assert f"and is off by {off:.2f} at most in ln S" in document
    word = "describes" if off <= 0.20 else "does not describe"
    assert f"the hyperbola {word} the measured steps" in document


def test_the_steps_are_at_the_rate_that_a_seed_of_its_own_found(parts: Modules) -> None:
    table: dict[int, dict[float, float]] = {}
    for run in RAW["tuning"]["runs"]:
        table.setdefault(run["size"], {})[run["lr"]] = run["updates"] or math.inf
    for run in RAW["steps"]["runs"]:
        rates = table[run["size"]]
        assert rates[run["lr"]] == min(rates.values())
        assert max(rates.values()) > 1.5 * min(rates.values())  # control: there was a choice
        assert run["seed"] != parts.rates.SEED
    assert list(table) == [1, 8, 32, 128, 512, 2048]


def test_a_size_that_does_not_reach_the_target_is_named_and_not_fitted(parts: Modules) -> None:
    changed = json.loads(json.dumps(RAW))
    next(run for run in changed["steps"]["runs"] if run["size"] == 8)["updates"] = None
    assert 8 not in [size for size, _ in parts.document_noise.measured_points(changed)]
    text = parts.document_sections.text_from(changed)
    assert "Not reached by all seeds at B = 8." in text
    assert "Not reached" not in parts.document_sections.text_from(RAW)  # control


def test_all_runs_took_less_than_an_hour() -> None:
    parts = [part for part in RAW.values() if isinstance(part, dict) and "runs" in part]
    assert sum(part["wall_seconds"] for part in parts) < 3600
    assert RAW["machine"]["cores"] == 2


def test_the_gap_and_the_warm_ups_are_ranked_as_the_figures_are(parts: Modules) -> None:
    document = (DOCS / "scaling-rules.md").read_text(encoding="utf8").replace("\n", " ")
    gaps: dict[int, list[float]] = {}
    for run in RAW["gap"]["runs"]:
        gaps.setdefault(run["size"], []).append(run["test_loss"] - run["train_loss"])
    order = sorted(gaps, key=lambda size: np.mean(gaps[size]))
    assert f"smallest at {order[0]:,} ({np.mean(gaps[order[0]]):.3f})" in document
    assert f"largest at {order[-1]:,} ({np.mean(gaps[order[-1]]):.3f})" in document
    ends: dict[tuple[str, int], list[float]] = {}
    for run in RAW["warmup"]["runs"]:
        ends.setdefault((run["arm"], run["size"]), []).append(run["train_loss"][-1])
    for size in parts.warmup.SIZES:
        arms = sorted(parts.warmup.ARMS, key=lambda arm: np.mean(ends[arm, size]))
        assert f"At {size:,}, from the lowest training loss to the highest: {', '.join(arms)}." in (
            document
        )
    reference = np.mean(ends.pop(("reference", 32)))
    near = sum(abs(math.log(np.mean(losses) / reference)) <= 0.10 for losses in ends.values())
    assert f"Of these {len(ends)} large batches {near or 'none'} match the small." in document
