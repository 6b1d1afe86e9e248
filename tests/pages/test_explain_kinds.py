"""Pages of unusual batches: each opens, says what is so, and shows no broken number."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from browser import browser, draw_all, open_page

Batch = tuple[Tensor, Tensor]
BROKEN = re.compile(r"NaN|undefined|\[object|∞|\d e[−-]?\d|−0(?![.\d])|–°")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as figures:
        yield figures


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def entropy_and_size(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    outputs = model(batch[0])
    losses = F.cross_entropy(outputs, batch[1], reduction="none")
    return {"entropy": losses, "size": outputs.square().mean(1)}


def nothing(model: nn.Module, batch: Batch) -> Tensor:
    return 0 * model(batch[0]).sum(1)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def likelihood(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])[:, 0] - 1


def contrast(losses: ab.ExampleLosses) -> Tensor:
    return (losses.values @ losses.values.T).logsumexp(1).mean()


def one_for_all(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).clone()


TWO_TERMS = {"entropy": ab.Mean(), "size": 0.1 * ab.Mean()}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = {
    "largest loss": (entropy, {"reduction": ab.Max()}, {}, "1 of 12 examples made this update"),
    "half of them": (
        entropy,
        {"reduction": ab.TopFraction(0.5)},
        {},
        "6 of 12 examples pulled in different directions",
    ),
    "tilted": (entropy, {"reduction": ab.Tilted(1.0)}, {}, "12 examples pulled"),
    "sum and L1": (entropy, {"reduction": ab.Sum(), "penalty": ab.L1(0.1)}, {}, "12 examples"),
    "two terms": (entropy_and_size, {"reduction": TWO_TERMS}, {}, "12 examples pulled"),
    "embeddings": (embed, {"reduction": contrast}, {}, "12 examples pulled"),
    "losses below 0": (likelihood, {}, {}, "12 examples pulled"),
    "clipped one by one": (entropy, {}, {"clip": ab.ClipExamples(0.5)}, "12 examples pulled"),
    "clipped": (entropy, {}, {"clip": ab.ClipNorm(0.1)}, "12 examples pulled"),
    "nothing": (nothing, {}, {}, "12 examples became one update; the weights did not move."),
}


@pytest.mark.parametrize("name", CASES)
def test_a_page_of_any_batch_opens_and_shows_no_broken_number(
    chromium: Any, tmp_path: Path, name: str
) -> None:
    losses, objective, how, head = CASES[name]
    page_says(chromium, tmp_path, nn.Linear(5, 3), losses, objective, how, head)


def test_layers_that_couple_examples_tell_of_the_whole_batch_alone(
    chromium: Any, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    text = page_says(
        chromium, tmp_path, model, entropy, {"grain": 6}, {}, "12 examples became one update"
    )
    assert "Not measurable here. The gradient of a single example is not known" in text


def test_examples_that_are_all_the_same_have_no_noise(chromium: Any, tmp_path: Path) -> None:
    head = "12 examples pulled the same way; almost nothing cancelled"
    text = page_says(chromium, tmp_path, nn.Linear(5, 3), entropy, {}, {}, head, one_for_all)
    assert "the examples have the same gradient, so there is no noise" in text


def page_says(
    chromium: Any,
    folder: Path,
    model: nn.Module,
    losses: Callable[..., Any],
    objective: dict[str, Any],
    how: dict[str, Any],
    head: str,
    change: Callable[[Tensor], Tensor] = lambda x: x,
) -> str:
    """Make a page, see that it is sound and begins as it should; return its text."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    batch = change(torch.randn(12, 5)), change(torch.arange(12) % 3)
    everything = {"model": model, "objective": ab.Objective(losses, **objective), "batch": batch}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"key": ab.Key(seed=0, step=0), **how}
    gradient = ab.batch_gradient(*everything.values(), **how)
    figures = ab.explain(gradient, **everything, optimizer=optimizer, **how)
    with open_page(chromium, figures.save(folder / "page.html")) as (page, visited):
        draw_all(page)
        text = str(page.locator("body").inner_text())
        assert visited.complaints == []
        assert page.locator("#headline").inner_text().startswith(head)
    assert BROKEN.findall(text) == []
    assert BROKEN.findall("norm NaN, angle –°, −0") == ["NaN", "–°", "−0"]  # the control
    return text
