"""Layout of a page: no word is cut, no card is empty, and tables fit a phone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import browser, draw_all, open_page
from command_line import run_command
from explain_by_hand import OBSERVED, data_of, train_run

BATCH = 600  # of 1,438 training examples: 2 updates an epoch, and 1 checkpoint

CUT = """() => [...document.querySelectorAll(".scroll caption span")]
  .filter((one) => one.checkVisibility() && one.closest("caption").offsetWidth > 2)
  .filter((one) => one.getBoundingClientRect().right
                   > one.closest(".scroll").getBoundingClientRect().right + 0.5)
  .map((one) => one.textContent)"""

TOO_WIDE = """() => [...document.querySelectorAll(".card select, #worked table, #cancels table")]
  .filter((one) => one.checkVisibility())
  .filter((one) => one.getBoundingClientRect().right
                   > one.closest(".card").getBoundingClientRect().right - 4)
  .map((one) => one.textContent.slice(0, 40))"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of small batches, observed."""
    run = train_run(tmp_path_factory.mktemp("small"), **OBSERVED)
    run_command("explain", run, "--step", 30, "--out", run / "page.html")
    return run / "page.html"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of few large batches, without a ledger."""
    sections = {"run": {"epochs": 1, "threads": 1, "checkpoint_every": 20, "keep": 3}}
    model = {"name": "softmax_regression", "args": {"inputs": [1, 8, 8], "classes": 10}}
    run = train_run(
        tmp_path_factory.mktemp("large"), batch={"size": BATCH}, model=model, **sections
    )
    run_command("explain", run, "--step", 1, "--out", run / "page.html")
    return run / "page.html"


def test_words_and_tables_fit_a_phone(chromium: Any, small: Path) -> None:
    with open_page(chromium, small, width=375) as (page, _):
        page.click("nav a[href='#run']")
        draw_all(page)
        assert page.evaluate(CUT) == []
        assert page.evaluate(TOO_WIDE) == []
        page.add_style_tag(content="caption span { max-width: none; white-space: nowrap }")
        assert "The 12 with the largest" in " ".join(page.evaluate(CUT))  # the controls
        page.add_style_tag(content=".field { max-width: none; grid-template-columns: 30rem }")
        page.add_style_tag(content="select { width: 30rem; max-width: none }")
        assert len(page.evaluate(TOO_WIDE)) > 0


def test_a_curve_of_too_few_points_is_a_line_of_text_and_no_card(
    chromium: Any, large: Path, small: Path
) -> None:
    with open_page(chromium, large) as (page, _):
        text = page.locator("#noise .why").inner_text()
        assert text.startswith("Not measurable here. The noise scale over training.")
        assert "needs 3 steps with a noise scale" in text
        assert "train with observe.norms=true" in text
        assert page.locator("#noise .card .why").count() == 0
        assert "Noise scale over training" not in page.locator("#noise").inner_text()
    with open_page(chromium, small) as (page, _):  # the control
        assert "Noise scale over training" in page.locator("#noise").inner_text()


def test_no_batch_is_larger_than_the_data(chromium: Any, large: Path) -> None:
    sizes = [row["size"] for row in data_of(large.read_text())["noise"]["buys"]]
    assert max(sizes) > 1438  # the control: such sizes are in the file
    with open_page(chromium, large) as (page, _):
        heads = page.locator("#noise table tbody th").all_inner_texts()
        output = [int(text.split()[0].replace(",", "")) for text in heads]
    assert output == [150, 300, 600, 1200]


def test_a_run_without_a_ledger_is_not_called_by_its_name(chromium: Any, large: Path) -> None:
    with open_page(chromium, large) as (page, _):
        page.click("nav a[href='#run']")
        text = page.locator("#run .why").inner_text()
    assert text == (
        "Not measurable here. This run has no ledger. Train with --set observe.norms=true to have "
        "one."
    )


def test_reductions_are_said_in_words(chromium: Any, large: Path) -> None:
    with open_page(chromium, large) as (page, _):
        cells = page.locator("#reductions .body table tbody td:nth-child(2)").all_inner_texts()
    assert cells == [
        "sum of the losses / number of examples",
        "sum of the losses",
        "the largest loss",
        "mean of the larger half of the losses",
        "log of the mean of exp(loss)",
    ]
