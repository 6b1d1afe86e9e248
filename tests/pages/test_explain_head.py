"""Head of a page: its sentence, its picture, and that nothing is hidden."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from anybatch.report.replay import restore_position
from browser import browser, draw_all, open_page
from command_line import run_command, write_recipe
from explain_by_hand import OBSERVED, data_of, each_gradient, rows, train_run

STEP = 22
MOST_EMPTY = 400  # pixels beside or below what a card shows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("head"), **OBSERVED)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    run_command("explain", run, "--step", STEP, "--out", run / "page.html")
    return run / "page.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


@pytest.fixture
def page(chromium: Any, file: Path) -> Iterator[Any]:
    with open_page(chromium, file) as (figures, _):
        yield figures


@pytest.fixture(scope="module")
def gradients(run: Path) -> torch.Tensor:
    """Compute each example's gradient, by plain autograd: [24, weights]."""
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    inputs, targets = (column[ids] for column in place.setup.data.columns)
    return rows(each_gradient(place.setup.model, inputs, targets))


def value(page: Any, selector: str) -> float:
    return float(page.locator(selector).get_attribute("data-value"))


def weights_before(run: Path, step: int) -> torch.Tensor:
    model = restore_position(run, step, allow_code=False).setup.model
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_sentence_has_the_numbers_of_plain_autograd(
    page: Any, run: Path, gradients: torch.Tensor
) -> None:
    before, after = weights_before(run, STEP), weights_before(run, STEP + 1)
    losers = 1 - float(gradients.mean(0).norm() / gradients.norm(dim=1).mean())
    moved = float((after - before).norm() / before.norm())
    assert value(page, "#headline-lost") == pytest.approx(losers, rel=1e-6)
    assert value(page, "#headline-moved") == pytest.approx(moved, rel=1e-6)
    text = page.locator("#headline").inner_text().replace("\u00a0", " ")
    assert text == (
        f"24 examples pulled in different directions; {100 * losers:.0f} % of it cancelled; the "
        f"weights moved by {float(f'{100 * moved:.2g}'):g} %."
    )
    wrong = 1 - float(gradients.mean(0).norm() / gradients.norm(dim=1).sum())  # the control
    assert losers != pytest.approx(wrong, rel=0.01)


def test_the_picture_draws_each_gradient_as_long_and_as_far_from_the_update_as_it_is(
    page: Any, gradients: torch.Tensor
) -> None:
    ends = page.locator(".fan line.pull").evaluate_all(
        "all => all.map(l => [l.x2.baseVal.value - l.x1.baseVal.value, "
        "l.y1.baseVal.value - l.y2.baseVal.value, l.classList.contains('cut')])"
    )
    tips = page.locator(".fan path.tip").evaluate_all(
        "all => all.map(p => Number(p.getAttribute('d').split(' ')[2]))"
    )
    start = page.locator(".fan line.pull").first.evaluate("l => l.y1.baseVal.value")
    agreed, left = (start - tip for tip in tips)
    mean, norms = gradients.mean(0), gradients.norm(dim=1)
    cosines = gradients @ mean / (norms * mean.norm())
    order = cosines.argsort(descending=True)
    assert len(ends) == 24
    scale = agreed / float(norms.mean())
    assert left == pytest.approx(scale * float(mean.norm()), rel=1e-3)
    for (x, y, is_cut), i in zip(ends, order.tolist(), strict=True):
        assert y / math.hypot(x, y) == pytest.approx(float(cosines[i]), abs=1e-3)
        limit = 2 * scale * float(norms.mean())
        length = min(scale * float(norms[i]), limit)
        assert math.hypot(x, y) == pytest.approx(length, rel=1e-3)
        assert is_cut == (scale * float(norms[i]) > limit * (1 + 1e-6))
    along = int((cosines >= 0).sum())
    assert f"{along} examples pull along" in page.locator(".fan figcaption").inner_text()
    assert 0 < along < 24  # the control: up and down are told apart


def test_loss_means_the_data_loss_and_the_penalty_stands_by_itself(page: Any, run: Path) -> None:
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    inputs, targets = (column[ids] for column in place.setup.data.columns)
    data = float(F.cross_entropy(place.setup.model(inputs), targets).detach())
    names = [name for name, _ in place.setup.model.named_parameters()]
    each_row = dict(zip(names, place.setup.model.parameters(), strict=True))
    squares = sum(float(w.detach().square().sum()) for n, w in each_row.items() if "weight" in n)
    facts = {
        figure.locator("dt").inner_text(): value(figure, ".value")
        for figure in page.locator("#facts .figure").all()
    }
    assert facts["data loss"] == pytest.approx(data, rel=1e-9)
    assert facts["penalty"] == pytest.approx(0.005 * squares, rel=1e-9)
    assert facts["total loss"] == pytest.approx(data + 0.005 * squares, rel=1e-9)
    assert "loss" not in facts
    assert "in epoch 1 of the run" in page.locator("header .lead").inner_text()


def test_the_sections_come_in_order_and_the_run_is_folded_away(page: Any) -> None:
    titles = [text.split(maxsplit=1)[1] for text in page.locator("nav a").all_inner_texts()]
    assert titles == [
        *("Step by step", "The examples", "Where it goes", "Sum or mean"),
        *("Max-pooling", "Noise", "The run"),
    ]
    assert page.locator("main > aside#start").is_visible()
    assert not page.locator("#run .body").is_visible()
    page.click("nav a[href='#run']")
    page.locator("#run .body").wait_for()
    page.locator("#run .plot.drawn").first.wait_for()


def test_the_formula_says_what_each_of_its_letters_is(page: Any) -> None:
    page.click(".symbols summary")
    symbols = page.locator(".symbols dt").all_inner_texts()
    formula = page.locator(".symbols .equation").inner_text()
    for part in re.findall(r"[Σc∇vΩ]", formula):
        assert any(part in symbol for symbol in symbols)
    text = page.locator(".symbols").inner_text()
    assert "Here 1/24 for each." in text
    assert "coefficient" not in page.locator(".ledger thead").inner_text()  # said once


def test_pictures_are_large_enough_and_the_chosen_pair_stays_in_sight(page: Any) -> None:
    sizes = page.locator("canvas.image:visible").evaluate_all(
        "all => all.map(c => Math.min(c.getBoundingClientRect().width, "
        "c.getBoundingClientRect().height))"
    )
    assert len(sizes) > 24
    assert min(sizes) >= 40
    box = page.locator("#examples .body").bounding_box()
    for part in (0.3, 0.6, 0.9):
        page.evaluate("y => scrollTo({top: y, behavior: 'instant'})", box["y"] + part * 1500)
        page.wait_for_timeout(50)
        pair = page.locator("#pair").bounding_box()
        assert 0 <= pair["y"] < 900
    page.evaluate("document.querySelector('#pair').style.position = 'static'")  # the control
    assert page.locator("#pair").bounding_box()["y"] < 0


EMPTY = """() => {
  const ends = (element) => {
    const marks = [...element.querySelectorAll("p, table, canvas, .plot, button, dl, li, summary")];
    const seen = marks.filter((one) => one.checkVisibility());
    return Math.max(...seen.map((one) => one.getBoundingClientRect().bottom));
  };
  return [...document.querySelectorAll(".columns")].filter((one) => one.checkVisibility())
    .flatMap((one) => [...one.children].map((child) => [
      one.closest("section, aside").id, one.getBoundingClientRect().bottom - ends(child)]));
}"""


def test_no_card_leaves_a_hole_beside_it(page: Any) -> None:
    page.click("nav a[href='#run']")
    draw_all(page)
    assert [one for one in page.evaluate(EMPTY) if one[1] > MOST_EMPTY] == []
    page.add_style_tag(content="#worked { padding-bottom: 600px }")  # the control
    assert [one[0] for one in page.evaluate(EMPTY) if one[1] > MOST_EMPTY] == ["start"] * 2


def test_what_two_examples_cannot_tell_is_not_drawn(
    chromium: Any, run: Path, tmp_path: Path
) -> None:
    run_command("explain", run, "--batch", "3,17", "--out", tmp_path / "two.html")
    with open_page(chromium, tmp_path / "two.html") as (page, visited):
        assert page.locator("#headline").inner_text().startswith("2 examples pulled")
        noise = page.locator("#noise").inner_text()
        assert "Not measurable here. A spread of 2 gradient norms is no spread" in noise
        assert page.locator("#noise figure.chart", has_text="How hard").count() == 0
        assert page.locator(".sums").count() == 0
        assert visited.complaints == []
        text = page.locator("body").inner_text()
        assert re.search(r"\d(\.\d+)?e[−+-]?\d", text) is None
        assert not {"NaN", "undefined", "null", "Infinity"} & set(re.findall(r"\w+", text))


def test_one_example_makes_a_page_as_well(chromium: Any, run: Path, tmp_path: Path) -> None:
    run_command("explain", run, "--batch", "3", "--out", tmp_path / "one.html")
    with open_page(chromium, tmp_path / "one.html") as (page, visited):
        assert page.locator("#headline").inner_text().startswith("1 example made this update")
        assert page.locator(".fan").count() == 0
        assert (
            "a batch of one example has no pairs" in page.locator("#compare").inner_text().lower()
        )
        assert visited.complaints == []


def test_numbers_of_a_table_have_the_names_of_its_columns(chromium: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    lines = [f"{a:.2f};{b:.2f};{int(a > 0)};1.5" for a, b in x.tolist()]
    (tmp_path / "table.csv").write_text("\ufeffwidth;height;kind;w\n" + "\n".join(lines))
    args = {"path": str(tmp_path / "table.csv"), "target": "kind", "delimiter": ";"}
    recipe_file = write_recipe(
        tmp_path,
        model={"name": "mlp", "args": {"inputs": [2], "hidden": [4], "classes": 2}},
        data={"name": "csv", "args": {**args, "weights": "w", "inputs": ["height", "width"]}},
        batch={"size": 16},
    )
    run_command("train", recipe_file, "--out", tmp_path / "run")
    run_command("explain", tmp_path / "run", "--out", tmp_path / "page.html")
    figures = data_of((tmp_path / "page.html").read_text())["examples"]
    for example, text in zip(figures["ids"], figures["pictures"]["texts"], strict=True):
        a, b = (float(f"{z:.2f}") for z in x[example].tolist())
        statement = f"height {b:.3g} · width {a:.3g}".replace("-", "−")
        assert text.replace("\u00a0", " ") == statement
        assert text.count("\u00a0") == 3  # a name and its number stay on one line
    with open_page(chromium, tmp_path / "page.html") as (page, visited):
        assert "height" in page.locator(".ledger tbody tr").first.inner_text()
        assert "Max-pooling" not in page.locator("nav").inner_text()
        assert page.locator("#pooling").count() == 0
        assert visited.complaints == []
