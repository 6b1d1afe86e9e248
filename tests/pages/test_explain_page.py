"""Open the page in a real browser: from the disk, without requests, and use it."""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch.report.replay import Position, restore_position
from browser import CONTRAST, browser, draw_all, open_page
from command_line import run_command
from explain_by_hand import OBSERVED, data_of, each_gradient, rows, train_run

STEP = 43
LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3
SIDEWAYS = "document.documentElement.scrollWidth"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("page"), **OBSERVED)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    run_command("explain", run, "--step", STEP, "--out", run / "page.html")
    return run / "page.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


@pytest.fixture(scope="module")
def page(chromium: Any, file: Path) -> Iterator[Any]:
    """One page for the tests that do not mind what others have pressed."""
    with open_page(chromium, file) as (figures, _):
        yield figures


@pytest.fixture
def fresh(chromium: Any, file: Path) -> Iterator[Any]:
    with open_page(chromium, file) as (figures, _):
        yield figures


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 1440), ("light", 375)])
def test_it_opens_from_the_disk_asks_for_nothing_and_can_be_read(
    chromium: Any, file: Path, theme: str, width: int
) -> None:
    with open_page(chromium, file, theme=theme, width=width) as (page, visited):
        assert draw_all(page) > 10
        figures = page.evaluate(CONTRAST)
        assert len(figures) > 500
        assert [one for one in figures if one["ratio"] < LEAST_CONTRAST] == []
        for summary in page.locator("figure:visible summary").all():
            summary.click()
        assert page.evaluate(SIDEWAYS) == width
        page.click("#theme")
        page.wait_for_timeout(300)
        assert visited.complaints == []
        assert visited.requests == []
        assert page.locator("main > section").count() == 7


def test_text_too_pale_and_a_page_too_wide_are_seen(fresh: Any) -> None:  # the controls
    fresh.add_style_tag(content=".note { color: #999 !important; background: #ccc !important }")
    assert any(one["ratio"] < LEAST_CONTRAST for one in fresh.evaluate(CONTRAST))
    fresh.add_style_tag(content="footer { width: 2000px !important }")
    assert fresh.evaluate(SIDEWAYS) == 2000


def test_a_script_from_outside_or_unknown_is_not_run(chromium: Any, file: Path) -> None:
    text = file.read_text()
    faulty = file.with_name("broken.html")
    more = "<script>document.title = 'run'</script><img src='https://example.org/x.png'>"
    faulty.write_text(text.replace("</body>", f"{more}</body>"))
    with open_page(chromium, faulty) as (page, visited):
        assert page.title() != "run"
        assert any(
            "Content Security Policy" in statement for statement in visited.complaints
        )  # the control


def read(page: Any, column: str) -> list[float]:
    """A column of the table of examples as it stands."""
    heads = [text.rstrip(" ↑↓") for text in page.locator(".ledger thead th").all_inner_texts()]
    cells = page.locator(f".ledger tbody tr td:nth-child({heads.index(column) + 1})")
    return [float(cell.get_attribute("data-value")) for cell in cells.all()]


@pytest.mark.smoke
def test_the_table_of_examples_has_the_numbers_of_plain_autograd(page: Any, run: Path) -> None:
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    each_row = rows_of(place, list(range(24)))
    norms, mean = each_row.norm(dim=1), each_row.mean(0)
    share = each_row @ mean / 24 / mean.norm() ** 2
    at = {example: k for k, example in enumerate(ids.tolist())}
    order = [at[int(example)] for example in read(page, "example")]
    assert read(page, "gradient norm") == pytest.approx(norms[order].tolist(), rel=1e-9)
    assert read(page, "share") == pytest.approx(share[order].tolist(), rel=1e-9)
    text = page.locator(".ledger tbody tr").first.inner_text()
    assert number(float(norms[order[0]])) in text
    length = float(page.locator("#cancel-sum").get_attribute("data-value"))
    assert length == pytest.approx(float(mean.norm()), rel=1e-9)
    wrong = each_row.sum(0).norm()  # the control: the sum is told from the mean
    assert length != pytest.approx(float(wrong), rel=0.1)


def test_sorting_goes_both_ways_and_is_told(page: Any) -> None:
    button = page.locator(".ledger th button", has_text="gradient norm")
    button.click()
    assert read(page, "gradient norm") == sorted(read(page, "gradient norm"), reverse=True)
    head = page.locator(".ledger th", has=page.locator("button", has_text="gradient norm"))
    assert head.get_attribute("aria-sort") == "descending"
    button.click()
    assert read(page, "gradient norm") == sorted(read(page, "gradient norm"))
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator(".ledger th[aria-sort]").count() == 1


def test_filtering_by_text_and_by_what_goes_wrong(page: Any) -> None:
    assert page.locator(".count").inner_text() == "24 of 24 examples"
    example = int(read(page, "example")[3])
    page.fill("input[type=search]", str(example))
    assert example in read(page, "example")
    assert len(read(page, "example")) < 24
    page.fill("input[type=search]", "")
    page.check("text=pulls against the update")
    angles = read(page, "angle")
    assert all(angle > 90 for angle in angles)
    assert page.locator(".count").inner_text() == f"{len(angles)} of 24 examples"
    page.uncheck("text=pulls against the update")


def rows_of(place: Position, places: list[int]) -> torch.Tensor:
    """Compute the gradients of some examples of the batch, by plain autograd."""
    ids = place.setup.order.indices(STEP)[places]
    inputs, targets = (column[ids] for column in place.setup.data.columns)
    return rows(each_gradient(place.setup.model, inputs, targets))


def test_two_examples_are_compared_by_parameter_and_by_weight(
    page: Any, run: Path, file: Path
) -> None:
    data = data_of(file.read_text())
    first, second = (int(k) for k in read(page, "example")[:2])
    page.click(".ledger tbody tr:nth-child(1) button[data-side=A]")
    page.click(".ledger tbody tr:nth-child(2) button[data-side=B]")
    compare = page.locator("#compare")
    assert f"example {first}" in compare.locator(".side-A").inner_text()
    assert f"example {second}" in compare.locator(".side-B").inner_text()
    cells = compare.locator("table", has_text="by parameter").first.locator("tbody tr")
    by_parameter = [
        float(c.get_attribute("data-value")) for c in cells.locator("td:nth-child(2)").all()
    ]
    dot = float(compare.locator(".figure .value").nth(1).get_attribute("data-value"))
    assert sum(by_parameter) == pytest.approx(dot, rel=1e-9)
    assert len(by_parameter) == len(data["pairs"]["parameters"])
    place = restore_position(run, STEP, allow_code=False)
    at = place.setup.order.indices(STEP).tolist()
    a, b = rows_of(place, [at.index(first), at.index(second)]) / 24
    both, cancels = (
        float(compare.locator(".figure .value").nth(k).get_attribute("data-value")) for k in (2, 3)
    )
    assert dot == pytest.approx(float(a @ b) * 24**2, rel=1e-9)
    assert both == pytest.approx(float((a + b).norm()), rel=1e-9)
    assert cancels == pytest.approx(1 - both / float(a.norm() + b.norm()), rel=1e-9)
    wrong = 1 - both / abs(float(a.norm() - b.norm()))  # the control: a difference of lengths
    assert cancels != pytest.approx(wrong, rel=0.1)
    compare.locator("select").select_option(label="7.bias")
    assert "Shown are 10 of 10 weights of 7.bias" in compare.inner_text()
    part = by_parameter[data["pairs"]["parameters"].index("7.bias")]
    products = compare.locator("table", has_text="Weights where").locator("tbody td:nth-child(4)")
    assert products.count() > 0
    text = compare.locator("p.note", has_text="They make up").inner_text()
    assert text.count(number(part)) == 2  # all ten weights are all there is


def number(x: float) -> str:
    """Three digits, as the page writes them."""
    size = abs(x)
    if size and size < 1e-4:
        mantissa, _, power = f"{x:.2e}".partition("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{float(mantissa):g} × 10{raised}".replace("-", "−")
    digits = 0 if not size else max(0, 2 - math.floor(math.log10(size)))
    text = f"{x:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def test_the_stages_play_and_can_be_passes_of_unit_by_keys(page: Any) -> None:
    stages = page.locator(".steps button")
    names = [text.split()[-1] for text in stages.all_inner_texts()]
    assert names == ["forward", "backward", "sum", "divide", "penalty", "optimise"]
    current = page.locator(".steps button[aria-current]")
    assert current.inner_text().endswith("forward")
    page.click("#play")
    page.wait_for_function("() => document.querySelectorAll('.steps .done').length === 2")
    page.click("#play")  # a pause
    assert current.inner_text().endswith("sum")
    page.locator(".sums input").fill("1")
    assert "After 1 of 24 examples" in page.locator(".sums").inner_text()
    stages.nth(2).focus()
    page.keyboard.press("ArrowRight")
    assert current.inner_text().endswith("divide")
    followed = page.locator("#stages table", has_text="weight before").locator("tbody td")
    values = followed.evaluate_all("cells => cells.map(cell => cell.dataset.value)")
    assert float(values[1]) == pytest.approx(24 * float(values[2]), rel=1e-9)
    assert values[3:] == [None] * 4
    for _ in range(2):
        page.click("#next")
    values = [float(v) for v in followed.evaluate_all("cells => cells.map(c => c.dataset.value)")]
    assert values[2] + values[3] == pytest.approx(values[4], rel=1e-6)
    assert values[5] - values[0] == pytest.approx(values[6], rel=1e-6)


def test_a_window_sends_its_gradient_to_its_winner_alone(page: Any, run: Path) -> None:
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    inputs, targets = (column[ids] for column in place.setup.data.columns)
    model = place.setup.model
    x = model[0](inputs).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model[1:](x), targets, reduction="sum")
    (arriving,) = torch.autograd.grad(loss, x)
    page.locator("#pooling select").nth(1).select_option(index=5)
    row, column = page.locator("#pooling input[type=range]").all()
    row.fill("2")
    column.fill("1")
    channel = int(
        page.locator("#pooling select").nth(2).evaluate("s => s.selectedOptions[0].text.slice(8)")
    )
    window = arriving[5, channel, 4:6, 2:4].flatten().tolist()
    figures = float(page.locator("#arriving").get_attribute("data-value"))
    assert figures == pytest.approx(sum(window), rel=1e-9)
    cells = page.locator("#window tbody td").all()
    gets = [cell.locator(".note").first.inner_text() for cell in cells]
    assert [text != "gets 0" for text in gets] == [value != 0 for value in window]


def test_every_chart_has_a_table_of_its_numbers(page: Any) -> None:
    for chart in page.locator("figure.chart:visible").all():
        chart.locator("summary").click()
        chart.locator("table caption").wait_for()
        assert chart.locator("tbody tr").count() > 0
        label = chart.locator(".plot").get_attribute("aria-label")
        assert len(label) > 20
        assert chart.locator(".plot").get_attribute("role") == "img"


def test_what_is_pressed_and_what_is_seen_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas, [role=region]")]
        .filter((one) => !one.getAttribute("aria-label") && !one.textContent.trim())
        .filter((one) => ![...(one.labels ?? [])].some((label) => label.control === one))
        .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("main th:not([scope])").count() == 0
    levels = page.locator("h1, h2, h3, h4").evaluate_all(
        "all => all.map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_all_of_it_can_be_reached_and_used_by_keys(fresh: Any) -> None:
    fresh.keyboard.press("Tab")
    assert fresh.evaluate("document.activeElement.className") == "skip"
    fresh.keyboard.press("Enter")
    fresh.keyboard.press("Tab")
    assert fresh.evaluate("document.activeElement.textContent").endswith("forward")
    fresh.locator(".ledger th button", has_text="loss").focus()
    fresh.keyboard.press("Enter")
    assert read(fresh, "loss") == sorted(read(fresh, "loss"), reverse=True)
    reached = fresh.evaluate(
        """() => [...document.querySelectorAll("button, select, input, summary, a[href]")]
        .filter((one) => one.checkVisibility() && !one.disabled && one.tabIndex < 0).length"""
    )
    assert reached == 0
    outline = fresh.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_theme_is_that_of_the_system_until_one_changes_it(chromium: Any, file: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with open_page(chromium, file, theme="dark") as (page, _):
        dark = page.evaluate(ground)
        page.click("#theme")
        assert page.evaluate(ground) != dark
        page.click("#theme")
        assert page.evaluate(ground) == dark


def test_the_sample_page_opens_by_itself_and_is_small(chromium: Any) -> None:
    sample = Path(__file__).parents[2] / "docs" / "sample-page.html"
    assert sample.stat().st_size < 1_000_000
    with open_page(chromium, sample) as (page, visited):
        assert page.locator("#headline").inner_text().startswith("32 examples pulled")
        page.click("nav a[href='#run']")
        assert draw_all(page) > 10
        assert visited.complaints == []
        assert visited.requests == []
        assert re.search(r"/(tmp|home|root|usr|work)\b", page.locator("body").inner_text()) is None
