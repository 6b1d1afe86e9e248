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
from browser import browser, opened
from command_line import anybatch
from explain_by_hand import data_of, distance, each_gradient, rows, unpacked

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
    with browser() as found:
        yield found


def test_a_gradient_alone_tells_what_it_holds_and_why_no_more(problem: Problem) -> None:
    found = ab.explain(problem.gradient()).sections
    own = rows(each_gradient(problem.model, *problem.batch))
    assert distance(unpacked(found["examples"]["norms"]), own.norm(dim=1)) < 1e-9
    assert found["examples"]["cancelled"]["sum"] == pytest.approx(float(own.mean(0).norm()))
    assert found["noise"]["scale"]["examples"] == 12
    assert found["reductions"]["rows"][0]["used"] == 12
    assert "norm" not in found["reductions"]["rows"][0]
    assert found["pooling"] is None
    assert found["run"] is None
    for section in ("layers", "stages"):
        assert "ab.explain(gradient, model=" in found[section]["why"]
    assert "whole example gradients were not observed" in found["pairs"]["why"]


def test_the_head_names_the_gradient_that_is_known(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    gradient = problem.gradient()
    both = rows(each_gradient(problem.model, *problem.batch)).mean(0)
    for note, found in (
        ("of the data loss", ab.explain(gradient)),
        ("with the penalty", ab.explain(gradient, **problem.everything())),
    ):
        with opened(chromium, found.save(tmp_path / "page.html")) as (page, seen):
            figure = page.locator("#facts .figure", has_text="gradient norm")
            assert figure.locator(".note").inner_text() == note
            length = float(figure.locator(".value").get_attribute("data-value"))
            is_data = note == "of the data loss"
            assert (length == pytest.approx(float(both.norm()), rel=1e-9)) == is_data
            assert seen.complaints == []
            assert ("Max-pooling" in page.locator("nav").inner_text()) == (not is_data)
            assert "The run" not in page.locator("nav").inner_text()


def test_gradients_observed_whole_tell_pairs_and_reductions(problem: Problem) -> None:
    found = ab.explain(problem.gradient(ab.Observe(gradients=True, share=True))).sections
    own = rows(each_gradient(problem.model, *problem.batch))
    inner = unpacked(found["pairs"]["inner"]).sum(1)
    i, j = torch.tril_indices(12, 12)
    assert distance(inner, (own @ own.T)[i, j]) < 1e-9
    norms = {row["name"]: row["norm"] for row in found["reductions"]["rows"]}
    assert norms["Sum"] == pytest.approx(float(own.sum(0).norm()))


def test_with_model_objective_and_batch_all_is_told_and_nothing_is_changed(
    problem: Problem,
) -> None:
    gradient = problem.gradient()
    grads = [p.grad.clone() for p in problem.model.parameters() if p.grad is not None]
    before = copy.deepcopy(problem.model.state_dict())
    found = ab.explain(gradient, **problem.everything()).sections
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name])
    left = [p.grad for p in problem.model.parameters()]
    assert all(a is not None and torch.equal(a, b) for a, b in zip(left, grads, strict=True))
    assert problem.optimizer.state == {}
    problem.optimizer.step()
    moved = [w - before[name] for name, w in problem.model.state_dict().items()]
    step = float(torch.cat([m.flatten() for m in moved]).norm())
    assert found["layers"]["norms"]["step"] == pytest.approx(step, rel=1e-9)
    assert found["pooling"]["layers"][0]["layer"] == "MaxPool2d 2"
    assert found["examples"]["labels"] == [str(k % 3) for k in range(12)]


def test_every_kind_of_update_has_its_stages(problem: Problem) -> None:
    for how, kind in (
        ({"clip": ab.ClipNorm(0.1)}, "ClipNorm"),
        ({"clip": ab.ClipExamples(0.1)}, "ClipExamples"),
    ):
        gradient = problem.gradient(ab.Observe(share=True), **how)
        found = ab.explain(gradient, **problem.everything(), **how).sections
        assert found["stages"]["clip"]["kind"] == kind
        lengths = float(unpacked(found["stages"]["partial"]["sums"])[-1])
        assert lengths == pytest.approx(found["layers"]["norms"]["data"], rel=1e-6)  # in float32
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
    ("kind", "settings", "carried"),
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
def test_what_has_to_be_carried_over_makes_the_same_update(
    problem: Problem, kind: Any, settings: dict[str, float], carried: dict[str, int]
) -> None:
    problem.objective = ab.Objective(losses)
    problem.optimizer = kind(problem.model.parameters(), lr=0.1, **settings)
    found = ab.explain(problem.gradient(), **problem.everything()).sections
    rate = found["reductions"]["compared"]["rate"]
    assert rate["carried"] == carried

    def moved(reduce: Any, lr: float, powers: dict[str, int]) -> torch.Tensor:
        model = copy.deepcopy(problem.model)
        own = {"eps": 1e-8, **settings} if "eps" in carried else settings
        times = {name: x * 12 ** powers.get(name, 0) for name, x in own.items()}
        optimizer = kind(model.parameters(), lr=lr, **times)
        reduce(
            F.cross_entropy(model(problem.batch[0]), problem.batch[1], reduction="none")
        ).backward()
        optimizer.step()
        pairs = zip(model.parameters(), problem.model.parameters(), strict=True)
        return torch.cat([(a - b).detach().flatten() for a, b in pairs])

    mean = moved(torch.mean, rate["mean"], {})
    assert distance(moved(torch.sum, rate["sum"], carried), mean) < 1e-9
    assert distance(moved(torch.sum, rate["sum"], {}), mean) > 1e-6  # the control: as they were


def test_overlapping_windows_add_up_what_they_send(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    problem.model[2], problem.model[4] = nn.MaxPool2d(3, 2), nn.Linear(16, 3)
    problem.model.double()
    found = ab.explain(problem.gradient(), **problem.everything())
    x = problem.model[:2](problem.batch[0]).detach().requires_grad_()
    loss = F.cross_entropy(problem.model[2:](x), problem.batch[1], reduction="sum")
    (arriving,) = torch.autograd.grad(loss, x)
    layer = found.sections["pooling"]["layers"][0]
    last = np.zeros((12, 4, 36))  # the control: of what a winner gets, the last alone
    winners, sent = (unpacked(layer[name]).reshape(12, 4, 4) for name in ("winners", "gradients"))
    np.put_along_axis(last, winners.astype(int), sent, 2)
    apart = [distance(a, b) for a, b in zip(last, arriving.flatten(2), strict=True)]
    worst = apart.index(max(apart))
    assert apart[worst] > 0.1
    with opened(chromium, found.save(tmp_path / "page.html")) as (page, _):
        chosen = page.locator("#pooling select")
        shown = page.locator("#pooling figure.map", has_text="Where it goes")
        for channel in range(4):
            chosen.nth(0).select_option(index=worst)
            chosen.nth(1).select_option(index=channel)
            shown.locator("summary").click()
            shown.locator("table").wait_for()
            cells = shown.locator("td").evaluate_all("all => all.map((one) => +one.dataset.value)")
            assert distance(cells, arriving[worst, channel].flatten()) < 1e-9


def test_several_terms_and_functions_are_told_as_far_as_they_go(problem: Problem) -> None:
    def two(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        outputs = model(batch[0])
        fit = F.cross_entropy(outputs, batch[1], reduction="none")
        return {"fit": fit, "size": outputs.square().sum(1)}

    problem.objective = ab.Objective(two, {"fit": ab.Mean(), "size": 0.01 * ab.Sum()})
    found = ab.explain(problem.gradient(ab.Observe(share=True)), **problem.everything()).sections
    assert [term["name"] for term in found["examples"]["terms"]] == ["fit", "size"]
    assert "several terms" in found["reductions"]["why"]
    assert found["about"]["reduction"] == "fit: Mean, size: 0.01 * Sum"
    assert unpacked(found["examples"]["share"]).sum() == pytest.approx(1)

    def worst(values: ab.ExampleLosses) -> torch.Tensor:
        return (values.values**2).mean()

    problem.objective = ab.Objective(losses, worst)
    found = ab.explain(problem.gradient(ab.Observe(share=True)), **problem.everything()).sections
    assert found["reductions"]["own"] == "worst"
    assert found["stages"]["way"] == "weigh"


def test_a_model_that_draws_needs_the_key_and_then_draws_the_same(problem: Problem) -> None:
    problem.model.insert(4, nn.Dropout(0.5))
    key = ab.Key(seed=0, step=3)
    gradient = problem.gradient(ab.Observe(share=True), key=key)
    found = ab.explain(gradient, **problem.everything(), key=key).sections
    own = unpacked(found["examples"]["share"])
    assert gradient.ledger is not None
    assert gradient.ledger.share is not None
    assert distance(own, gradient.ledger.share) < 1e-9
    pooled = found["pooling"]["layers"][0]
    assert unpacked(pooled["gradients"]).any()
    with pytest.raises(ModelError, match="draws random numbers"):
        ab.explain(gradient, **problem.everything())


def test_what_is_missing_or_has_moved_is_refused(problem: Problem) -> None:
    gradient = problem.gradient()
    with pytest.raises(BatchError, match="objective and batch missing"):
        ab.explain(gradient, model=problem.model)
    problem.optimizer.step()
    with pytest.raises(ModelError, match="have the weights moved since"):
        ab.explain(gradient, **problem.everything())


def test_without_the_extra_it_says_what_to_install(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    found = ab.explain(problem.gradient())
    with pytest.raises(ModelError, match=r"pip install 'anybatch\[report\]'"):
        _ = found.html


def test_it_is_saved_as_the_same_page(problem: Problem, tmp_path: Path) -> None:
    found = ab.explain(problem.gradient(), **problem.everything())
    path = found.save(tmp_path / "page.html")
    assert path.read_text() == found.html
    assert data_of(found.html)["about"]["examples"] == 12


def test_a_notebook_shows_it_in_a_frame_that_reaches_nothing(
    chromium: Any, problem: Problem, tmp_path: Path
) -> None:
    found = ab.explain(problem.gradient(), **problem.everything())
    frame = found._repr_html_()
    assert re.match(r'<iframe sandbox="allow-scripts" ', frame)
    assert html.unescape(re.search(r'srcdoc="(.*?)"', frame, re.DOTALL)[1]) == found.html
    notebook = tmp_path / "notebook.html"
    script = "<script>document.documentElement.dataset.ready = 'true'</script>"
    notebook.write_text(f"<!doctype html><html><p id=mine>cell</p>{frame}{script}</html>")
    with opened(chromium, notebook) as (page, seen):
        inner = page.frame_locator("iframe")
        inner.locator("html[data-ready]").wait_for()
        assert inner.locator(".ledger tbody tr").count() == 12
        inner.locator("#theme").click()
        reached = page.frames[1].evaluate(
            "() => { try { return Boolean(parent.document.body) } catch { return false } }"
        )
        assert reached is False
        assert seen.complaints == []


def test_help_is_there() -> None:
    assert "--allow-code" in anybatch("explain", "--help").out
