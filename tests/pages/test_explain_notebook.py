"""`ab.explain`: the page of a gradient of one's own, in a notebook."""

import copy
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import BatchError, ModelError
from browser import browser, open_page
from command_line import anybatch
from explain_by_hand import data_of, distance, each_gradient, rows, unpack

OBSERVED = ab.Observe(parameter_norms=True, alignment=True, share=True, noise_scale=True)


def losses(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Problem:
    """A small network on images, with everything that `ab.explain` takes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ).double()
        self.batch = torch.rand(12, 1, 8, 8).double(), torch.arange(12) % 3
        self.objective = ab.Objective(losses, penalty=ab.L2(0.1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def gradient(self, observe: ab.Observe | None = OBSERVED, **how: Any) -> ab.Gradient:
        return ab.batch_gradient(self.model, self.objective, self.batch, observe=observe, **how)

    def everything(self) -> dict[str, Any]:
        names = ("model", "objective", "batch", "optimizer")
        return {name: getattr(self, name) for name in names}


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


def test_a_gradient_alone_tells_what_it_holds_and_why_no_more(problem: Problem) -> None:
    figures = ab.explain(problem.gradient()).sections
    each_row = rows(each_gradient(problem.model, *problem.batch))
    assert distance(unpack(figures["examples"]["norms"]), each_row.norm(dim=1)) < 1e-9
    assert figures["examples"]["cancelled"]["sum"] == pytest.approx(float(each_row.mean(0).norm()))
    assert figures["noise"]["scale"]["examples"] == 12
    assert figures["reductions"]["rows"][0]["used"] == 12
    assert "norm" not in figures["reductions"]["rows"][0]
    assert figures["pooling"] is None
    assert figures["run"] is None
    for section in ("layers", "stages"):
        assert "ab.explain(gradient, model=" in figures[section]["why"]
    assert "whole example gradients were not observed" in figures["pairs"]["why"]


def test_the_head_names_the_gradient_that_is_known(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    gradient = problem.gradient()
    both = rows(each_gradient(problem.model, *problem.batch)).mean(0)
    for note, figures in (
        ("of the data loss", ab.explain(gradient)),
        ("with the penalty", ab.explain(gradient, **problem.everything())),
    ):
        with open_page(chromium, figures.save(tmp_path / "page.html")) as (page, visited):
            figure = page.locator("#facts .figure", has_text="gradient norm")
            assert figure.locator(".note").inner_text() == note
            length = float(figure.locator(".value").get_attribute("data-value"))
            is_data = note == "of the data loss"
            assert (length == pytest.approx(float(both.norm()), rel=1e-9)) == is_data
            assert visited.complaints == []
            assert ("Max-pooling" in page.locator("nav").inner_text()) == (not is_data)
            assert "The run" not in page.locator("nav").inner_text()


def test_two_examples_are_a_pair(problem: Problem) -> None:
    problem.batch = tuple(leaf[:2] for leaf in problem.batch)
    figures = ab.explain(problem.gradient(ab.Observe(gradients=True))).sections["pairs"]
    each_row = rows(each_gradient(problem.model, *problem.batch))
    truth = (each_row @ each_row.T).flatten()[[0, 2, 3]]
    assert distance(unpack(figures["inner"]).sum(1), truth) < 1e-9


def test_gradients_observed_whole_tell_pairs_and_reductions(problem: Problem) -> None:
    figures = ab.explain(problem.gradient(ab.Observe(gradients=True, share=True))).sections
    each_row = rows(each_gradient(problem.model, *problem.batch))
    inner = unpack(figures["pairs"]["inner"]).sum(1)
    i, j = torch.tril_indices(12, 12)
    assert distance(inner, (each_row @ each_row.T)[i, j]) < 1e-9
    norms = {row["name"]: row["norm"] for row in figures["reductions"]["rows"]}
    assert norms["Sum"] == pytest.approx(float(each_row.sum(0).norm()))


def test_with_model_objective_and_batch_all_is_told_and_nothing_is_changed(
    problem: Problem,
) -> None:
    gradient = problem.gradient()
    grads = [p.grad.clone() for p in problem.model.parameters() if p.grad is not None]
    before = copy.deepcopy(problem.model.state_dict())
    figures = ab.explain(gradient, **problem.everything()).sections
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    left = [p.grad for p in problem.model.parameters()]
    assert all(a is not None and torch.equal(a, b) for a, b in zip(left, grads, strict=True))
    assert problem.optimizer.state == {}
    problem.optimizer.step()
    moved = [w - before[name] for name, w in problem.model.state_dict().items()]
    step = float(torch.cat([m.flatten() for m in moved]).norm())
    assert figures["layers"]["norms"]["step"] == pytest.approx(step, rel=1e-9)
    assert figures["pooling"]["layers"][0]["layer"] == "MaxPool2d 2"
    assert figures["examples"]["labels"] == [str(k % 3) for k in range(12)]


def test_every_kind_of_update_has_its_stages(problem: Problem) -> None:
    for how, kind in (
        ({"clip": ab.ClipNorm(0.1)}, "ClipNorm"),
        ({"clip": ab.ClipExamples(0.1)}, "ClipExamples"),
    ):
        gradient = problem.gradient(ab.Observe(share=True), **how)
        figures = ab.explain(gradient, **problem.everything(), **how).sections
        assert figures["stages"]["clip"]["kind"] == kind
        lengths = float(unpack(figures["stages"]["partial"]["sums"])[-1])
        assert lengths == pytest.approx(figures["layers"]["norms"]["data"], rel=1e-6)  # in float32
    clipped = ab.explain(
        problem.gradient(ab.Observe(share=True), clip=ab.ClipNorm(0.1)),
        **problem.everything(),
        clip=ab.ClipNorm(0.1),
    ).sections
    cases = {one["case"]: one["factor"] for one in clipped["reductions"]["compared"]["clip"]}
    assert cases["Mean"] == pytest.approx(cases["Sum, N times the norm"])
    assert cases["Sum, the same norm"] == pytest.approx(cases["Mean"] / 12)
    assert clipped["layers"]["norms"]["update"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "scaled"),
    [
        (torch.optim.SGD, {"weight_decay": 0.3}, {"weight_decay": 1}),
        (torch.optim.Adam, {"weight_decay": 0.3}, {"eps": 1, "weight_decay": 1}),
        (torch.optim.AdamW, {"weight_decay": 0.3}, {"eps": 1}),
        (
            torch.optim.Adagrad,
            {"initial_accumulator_value": 1e-4},
            {"eps": 1, "initial_accumulator_value": 2},
        ),
    ],
)
def test_what_has_to_be_scaled_over_makes_the_same_update(
    problem: Problem, kind: Any, settings: dict[str, float], scaled: dict[str, int]
) -> None:
    problem.objective = ab.Objective(losses)
    problem.optimizer = kind(problem.model.parameters(), lr=0.1, **settings)
    figures = ab.explain(problem.gradient(), **problem.everything()).sections
    rate = figures["reductions"]["compared"]["rate"]
    assert rate["carried"] == scaled

    def move_weights(reduce: Any, lr: float, powers: dict[str, int]) -> torch.Tensor:
        model = copy.deepcopy(problem.model)
        each_row = {"eps": 1e-8, **settings} if "eps" in scaled else settings
        times = {name: x * 12 ** powers.get(name, 0) for name, x in each_row.items()}
        optimizer = kind(model.parameters(), lr=lr, **times)
        reduce(
            F.cross_entropy(model(problem.batch[0]), problem.batch[1], reduction="none")
        ).backward()
        optimizer.step()
        pairs = zip(model.parameters(), problem.model.parameters(), strict=True)
        return torch.cat([(a - b).detach().flatten() for a, b in pairs])

    mean = move_weights(torch.mean, rate["mean"], {})
    assert distance(move_weights(torch.sum, rate["sum"], scaled), mean) < 1e-9
    assert (
        distance(move_weights(torch.sum, rate["sum"], {}), mean) > 1e-6
    )  # the control: as they were


def test_overlapping_windows_add_up_what_they_send(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    problem.model[2], problem.model[4] = nn.MaxPool2d(3, 2), nn.Linear(16, 3)
    problem.model.double()
    figures = ab.explain(problem.gradient(), **problem.everything())
    x = problem.model[:2](problem.batch[0]).detach().requires_grad_()
    loss = F.cross_entropy(problem.model[2:](x), problem.batch[1], reduction="sum")
    (arriving,) = torch.autograd.grad(loss, x)
    layer = figures.sections["pooling"]["layers"][0]
    last = np.zeros((12, 4, 36))  # the control: of what a winner gets, the last alone
    winners, requests = (unpack(layer[name]).reshape(12, 4, 4) for name in ("winners", "gradients"))
    np.put_along_axis(last, winners.astype(int), requests, 2)
    apart = [distance(a, b) for a, b in zip(last, arriving.flatten(2), strict=True)]
    worst = apart.index(max(apart))
    assert apart[worst] > 0.1
    with open_page(chromium, figures.save(tmp_path / "page.html")) as (page, _):
        wins = page.locator("#pooling select")
        output = page.locator("#pooling figure.map", has_text="Where it goes")
        for channel in range(4):
            wins.nth(0).select_option(index=worst)
            wins.nth(1).select_option(index=channel)
            output.locator("summary").click()
            output.locator("table").wait_for()
            cells = output.locator("td").evaluate_all("all => all.map((one) => +one.dataset.value)")
            assert distance(cells, arriving[worst, channel].flatten()) < 1e-9


def test_several_terms_and_functions_are_told_as_far_as_they_go(problem: Problem) -> None:
    def two(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        outputs = model(batch[0])
        fit = F.cross_entropy(outputs, batch[1], reduction="none")
        return {"fit": fit, "size": outputs.square().sum(1)}

    problem.objective = ab.Objective(two, {"fit": ab.Mean(), "size": 0.01 * ab.Sum()})
    figures = ab.explain(problem.gradient(ab.Observe(share=True)), **problem.everything()).sections
    assert [term["name"] for term in figures["examples"]["terms"]] == ["fit", "size"]
    assert "several terms" in figures["reductions"]["why"]
    assert figures["about"]["reduction"] == "fit: Mean, size: 0.01 * Sum"
    assert unpack(figures["examples"]["share"]).sum() == pytest.approx(1)

    def worst(values: ab.ExampleLosses) -> torch.Tensor:
        return (values.values**2).mean()

    problem.objective = ab.Objective(losses, worst)
    figures = ab.explain(problem.gradient(ab.Observe(share=True)), **problem.everything()).sections
    assert figures["reductions"]["own"] == "worst"
    assert figures["stages"]["way"] == "weigh"


def test_a_model_that_draws_needs_the_key_and_then_draws_the_same(problem: Problem) -> None:
    problem.model.insert(4, nn.Dropout(0.5))
    key = ab.Key(seed=0, step=3)
    gradient = problem.gradient(ab.Observe(share=True), key=key)
    figures = ab.explain(gradient, **problem.everything(), key=key).sections
    each_row = unpack(figures["examples"]["share"])
    assert gradient.ledger is not None
    assert gradient.ledger.share is not None
    assert distance(each_row, gradient.ledger.share) < 1e-9
    pooled = figures["pooling"]["layers"][0]
    assert unpack(pooled["gradients"]).any()
    with pytest.raises(ModelError, match="draws random numbers"):
        ab.explain(gradient, **problem.everything())


def test_what_is_missing_or_has_moved_is_refused(problem: Problem) -> None:
    gradient = problem.gradient()
    with pytest.raises(BatchError, match="objective and batch missing"):
        ab.explain(gradient, model=problem.model)
    problem.optimizer.step()
    with pytest.raises(ModelError, match="Have the weights changed since"):
        ab.explain(gradient, **problem.everything())


def test_without_the_extra_it_says_what_to_install(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    figures = ab.explain(problem.gradient())
    with pytest.raises(ModelError, match=r"pip install 'anybatch\[report\]'"):
        _ = figures.html


def test_it_is_saved_as_the_same_page(problem: Problem, tmp_path: Path) -> None:
    figures = ab.explain(problem.gradient(), **problem.everything())
    path = figures.save(tmp_path / "page.html")
    assert path.read_text() == figures.html
    assert data_of(figures.html)["about"]["examples"] == 12


def test_a_notebook_shows_it_in_a_frame_that_reaches_nothing(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    figures = ab.explain(problem.gradient(), **problem.everything())
    frame = figures._repr_html_()
    assert re.match(r'<iframe sandbox="allow-scripts" ', frame)
    assert html.unescape(re.search(r'srcdoc="(.*?)"', frame, re.DOTALL)[1]) == figures.html
    notebook = tmp_path / "notebook.html"
    script = "<script>document.documentElement.dataset.ready = 'true'</script>"
    notebook.write_text(f"<!doctype html><html><p id=mine>cell</p>{frame}{script}</html>")
    with open_page(chromium, notebook) as (page, visited):
        inner = page.frame_locator("iframe")
        inner.locator("html[data-ready]").wait_for()
        assert inner.locator(".ledger tbody tr").count() == 12
        inner.locator("#theme").click()
        reached = page.frames[1].evaluate(
            "() => { try { return Boolean(parent.document.body) } catch { return false } }"
        )
        assert reached is False
        assert visited.complaints == []


def test_help_is_there() -> None:
    assert "--allow-code" in anybatch("explain", "--help").out
