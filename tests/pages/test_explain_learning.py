"""Parts of a page for learners: where to start, a part of the batch, ties, losses under Sum."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from anybatch.report.pooling import PoolingCall
from anybatch.report.replay import restore_position
from anybatch.report.ties import find_ties
from browser import browser, open_page
from command_line import run_command
from explain_by_hand import data_of, each_gradient, rows, train_run, unpack

STEP = 30


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train_run(tmp_path_factory.mktemp("learning"))
    run_command("explain", run, "--step", STEP, "--out", run / "page.html")
    return run


@pytest.fixture(scope="module")
def add_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = {
        "model": {"name": "softmax_regression", "args": {"inputs": [1, 8, 8], "classes": 10}},
        "objective": {"loss": "cross_entropy", "reduction": "sum"},
        "optimizer": {"name": "sgd", "lr": 0.001},
        "batch": {"size": 100, "last": "keep"},
    }
    run = train_run(tmp_path_factory.mktemp("summed"), **sections)
    run_command("explain", run, "--step", 3, "--out", run / "page.html")
    return run


@pytest.fixture(scope="module")
def gradients(run: Path) -> torch.Tensor:
    """Compute each example's gradient, by plain autograd: [24, weights]."""
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    inputs, targets = (column[ids] for column in place.setup.data.columns)
    return rows(each_gradient(place.setup.model, inputs, targets))


@pytest.fixture
def page(chromium: Any, run: Path) -> Iterator[Any]:
    with open_page(chromium, run / "page.html") as (figures, _):
        yield figures


def test_the_worked_batch_comes_before_the_table_of_examples(page: Any) -> None:
    start = page.locator("#start")
    assert start.locator("h2").inner_text() == "Start here"
    assert "Losses 2 and −2: is the gradient 0 too?\n\nNo." in start.inner_text()
    means = start.locator("tr.total").first.locator("td").all_inner_texts()
    assert means == ["1.35", "0.15", "0", "−0.2", "−0.8"]
    places = [page.locator(one).bounding_box()["y"] for one in ("#worked", "#stages", "#examples")]
    assert places == sorted(places)
    for link in start.locator("a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_each_stage_says_where_its_numbers_are_stored(page: Any) -> None:
    texts = []
    for button in page.locator(".steps button").all():
        button.click()
        texts.append(page.locator("#stage .stored").inner_text())
    assert len(texts) == len(set(texts)) == 6
    assert all(text.startswith("Where it is stored. ") for text in texts)
    assert [".grad" in text for text in texts] == [False, False, True, True, True, True]
    assert "undefined" not in " ".join(texts)


def test_the_first_examples_against_the_whole_batch(
    page: Any, run: Path, gradients: torch.Tensor
) -> None:
    figures = data_of((run / "page.html").read_text())["stages"]["firsts"]
    whole = gradients.mean(0)
    parts = torch.stack([gradients[: k + 1].mean(0) for k in range(24)])
    distances = (parts - whole).norm(dim=1) / whole.norm()
    angles = F.cosine_similarity(parts, whole[None]).clamp(-1, 1).acos().rad2deg()
    ratios = parts.norm(dim=1) / whole.norm()
    assert unpack(figures["distances"]) == pytest.approx(distances.numpy(), abs=1e-5)
    assert unpack(figures["angles"]) == pytest.approx(angles.numpy(), abs=1e-3)  # float32 degrees
    assert unpack(figures["ratios"]) == pytest.approx(ratios.numpy(), rel=1e-5)
    wrong = gradients.cumsum(0).norm(dim=1) / (24 * whole.norm())  # the control: sums, no means
    assert abs(float(wrong[5] - ratios[5])) > 0.1
    page.locator(".firsts input").fill("6")
    text = page.locator("#firsts-text").inner_text()
    assert text.startswith("The first 6 of 24 examples: their mean gradient is ")
    assert f"points {float(angles[5]):.0f}° away" in text
    line = page.locator(".firsts line.part").evaluate(
        "l => [l.x2.baseVal.value - l.x1.baseVal.value, l.y1.baseVal.value - l.y2.baseVal.value]"
    )
    sample = np.degrees(np.arctan2(line[0], line[1]))
    assert sample == pytest.approx(float(angles[5]), abs=0.1)
    page.locator(".firsts input").fill("24")
    assert "All 24 examples" in page.locator("#firsts-text").inner_text()


def look_at_windows(x: np.ndarray, sizes: dict[str, list[int]], shape: tuple[int, int]) -> Any:
    """Find the largest inputs of each window of a plane, input by input."""
    maxima, first, tied = np.zeros(shape, int), np.zeros(shape, int), np.zeros(x.shape, bool)
    for r, c in itertools.product(range(shape[0]), range(shape[1])):
        inputs = []
        for i, j in itertools.product(*(range(k) for k in sizes["kernel_size"])):
            row = r * sizes["stride"][0] - sizes["padding"][0] + i * sizes["dilation"][0]
            column = c * sizes["stride"][1] - sizes["padding"][1] + j * sizes["dilation"][1]
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                inputs.append((row, column))
        best = max(x[place] for place in inputs)
        largest = [place for place in inputs if x[place] == best]
        maxima[r, c] = len(largest)
        first[r, c] = largest[0][0] * x.shape[1] + largest[0][1]
        if len(largest) > 1:
            for place in largest:
                tied[place] = True
    return maxima, first, tied


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "stride": (3, 2), "dilation": (2, 1), "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    ],
)
def test_ties_are_those_found_input_by_input(arguments: dict[str, Any]) -> None:
    x = torch.randint(0, 4, (3, 2, 9, 8), generator=torch.Generator().manual_seed(0)).double()
    y, winners = F.max_pool2d_with_indices(x, **arguments)
    gradients = torch.rand(y.shape, generator=torch.Generator().manual_seed(1))
    call = PoolingCall("pool", arguments, x, y, winners, [gradients])
    names = ("kernel_size", "stride", "padding", "dilation")
    sizes = {name: call.get_sizes(name) for name in names}
    ties = find_ties(call)
    for i, k in itertools.product(range(3), range(2)):
        maxima, first, tied = look_at_windows(x[i, k].numpy(), sizes, tuple(y.shape[2:]))
        assert (ties.maxima[i, k].numpy() == maxima).all()
        assert (ties.first[i, k].numpy() == first).all()
        assert (ties.tied[i, k].numpy() == tied).all()
    has_tie = ties.maxima > 1
    assert 0 < int(has_tie.sum()) < has_tie.numel()  # the control: both kinds are there
    figures = ties.summarize(winners, gradients)
    assert figures["windows"] == y.numel()
    assert figures["tied"] == figures["first"] == int(has_tie.sum())  # PyTorch takes the first
    share = float(gradients[has_tie].sum() / gradients.sum())
    assert figures["gradient"] == pytest.approx(share, rel=1e-6)
    last = ties.summarize(winners + 1, gradients)  # the control: other winners
    assert last["first"] == 0


def test_ties_are_counted_and_marked_on_the_page(page: Any, run: Path) -> None:
    place = restore_position(run, STEP, allow_code=False)
    ids = place.setup.order.indices(STEP)
    x = place.setup.model[0](place.setup.data.columns[0][ids]).detach()
    windows = F.unfold(x.flatten(0, 1)[:, None], 2, stride=2)
    share = float(((windows == windows.amax(1, keepdim=True)).sum(1) > 1).double().mean())
    assert 0 < share < 1
    output = page.locator("#ties .ties").first.get_attribute("data-value")
    assert float(output) == pytest.approx(share, rel=1e-9)
    text = page.locator("#ties").inner_text()
    assert "It did so in every one of these windows." in text
    assert "like the teeth of a comb" in text
    layer = data_of((run / "page.html").read_text())["pooling"]["layers"][0]
    maxima = unpack(layer["maxima"])
    at = np.argwhere(maxima.max((2, 3)) > 1)[0]
    row, column = np.argwhere(maxima[at[0], at[1]] > 1)[0]
    page.locator("#pooling select").nth(1).select_option(index=int(at[0]))
    page.locator("#pooling select").nth(2).select_option(index=int(at[1]))
    ranges = page.locator("#pooling input[type=range]")
    ranges.nth(0).fill(str(row))
    ranges.nth(1).fill(str(column))
    assert page.locator("#window .tag", has_text="as large").count() == maxima[*at, row, column] - 1
    assert "all equal; it is one of them" in page.locator("#window").inner_text()
    assert "A ring is just as large" in page.locator("#pooling").inner_text()


def test_a_loss_under_sum_is_compared_per_example(chromium: Any, add_up: Path) -> None:
    figures = data_of((add_up / "page.html").read_text())["run"]
    records = [json.loads(row) for row in (add_up / "records.jsonl").read_text().splitlines()]
    steps = [row for row in records if row["kind"] == "step"]
    counts = [100] * 14 + [38]  # of 1,438 examples
    by_hand = [row["parts"]["data"] / n for row, n in zip(steps, counts, strict=True)]
    assert unpack(figures["curves"]["data_loss"]) == pytest.approx(by_hand, rel=1e-12)
    held_out = next(row for row in records if row["kind"] == "evaluation")
    (evaluation,) = figures["evaluations"]
    assert evaluation["data_loss"] == pytest.approx(held_out["parts"]["data"] / 359, rel=1e-12)
    assert evaluation["data_loss"] < 2 * by_hand[-1] < held_out["parts"]["data"]  # the control
    with open_page(chromium, add_up / "page.html") as (page, _):
        page.click("nav a[href='#run']")
        assert "Data loss per example" in page.locator("#run").inner_text()
        assert "can be compared" in page.locator("#run .note").first.inner_text()


def test_a_coefficient_is_explained_where_it_stands(chromium: Any, tmp_path: Path) -> None:
    objective = {"loss": "cross_entropy", "reduction": {"name": "tilted", "t": 1.0}}
    run = train_run(tmp_path, objective=objective)
    run_command("explain", run, "--step", 30, "--out", run / "page.html")
    with open_page(chromium, run / "page.html") as (page, _):
        assert "coefficient" in page.locator(".ledger thead").inner_text()
        notes = " ".join(page.locator("#examples p.note").all_inner_texts())
        assert "Coefficient: how much the loss of an example counts in the batch." in notes
        page.locator(".steps button", has_text="weigh").click()
        assert "how much the example counts under Tilted" in page.locator("#stage").inner_text()
        assert page.locator(".firsts").count() == 0  # the mean of a part is no Tilted gradient
