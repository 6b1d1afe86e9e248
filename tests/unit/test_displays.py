"""Displays in a notebook: gradients, ledgers and recipes as small tables.

Oracle: the standard library's parser of HTML reads the cells back, and NumPy or plain numbers give
what they must say.
"""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.ledger.ledger import Ledger
from anybatch.recipe.files import find_recipe, read_recipe


class Reader(HTMLParser):
    """Read the cells of all tables, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data):
        if data.strip() and self.rows:
            self.rows[-1][-1] += data


def read_rows(thing) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in Reader(thing._repr_html_()).rows}


def make_gradient(**arguments) -> ab.Gradient:
    """Gradients of w . x for x = (3, 4), (0, 1) and (6, 8), whose norms are 5, 1 and 10."""
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    batch = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]], dtype=torch.float64)
    objective = ab.Objective(lambda model, x: model(x)[:, 0], penalty=ab.L2(0.5))
    return ab.batch_gradient(model, objective, batch, **arguments)


def test_a_gradient_shows_its_loss_parts_and_sizes():
    rows = read_rows(make_gradient(layout=ab.Layout(micro_batch=2)))
    assert rows["loss"] == ["3.25"]  # (3 + 0 + 6) / 3, and 0.5 / 2 of the weight 1
    assert (rows["part: data"], rows["part: L2"]) == (["3"], ["0.25"])
    assert rows["examples in the batch"] == ["3"]
    assert rows["at most together in the model"] == ["2"]
    assert not {"norm before clipping", "warning", "share of the update"} & set(rows)


def test_a_clipped_gradient_shows_its_norm_and_one_that_is_not_finite_a_warning():
    gradient = make_gradient(clip=ab.ClipNorm(1.0))
    by_hand = np.hypot(3 + 0.5, 13 / 3)  # the mean of the rows, and the penalty's 0.5 w
    assert read_rows(gradient)["norm before clipping"] == [f"{by_hand:.4g}"]
    model = nn.Linear(1, 1, bias=False)
    roots = ab.Objective(lambda model, x: model(x)[:, 0].sqrt())  # the slope at 0 is infinite
    faulty = ab.batch_gradient(model, roots, torch.zeros(1, 1))
    assert "not finite" in read_rows(faulty)["warning"][0]


def test_a_ledger_shows_mean_smallest_and_largest_and_where_it_is():
    observe = ab.Observe(norms=True, share=True, parameter_norms=True)
    rows = read_rows(make_gradient(observe=observe))
    mean = np.mean([5, 1, 10])
    expected = [f"{mean:.4g}", "1", "10", "example 2"]
    assert rows["norm of the example's gradient"] == expected
    assert rows["norm in weight"] == expected
    gradients = np.array([[3, 4], [0, 1], [6, 8]])
    whole = gradients.mean(0)
    share = gradients @ whole / (whole @ whole) / 3
    figures = [f"{value:.4g}" for value in (share.mean(), share.min(), share.max())]
    assert rows["share of the update"] == [*figures, "example 2"]
    assert rows["loss"] == ["3.25"]  # the gradient's own table stands above
    assert "alignment with the batch's gradient" not in rows


def test_a_ledger_shows_its_noise_scale_and_an_empty_one_no_rows():
    observe = ab.Observe(noise_scale=True)
    gradient = make_gradient(observe=observe)
    scale = gradient.ledger.noise_scale
    rows = Reader(gradient.ledger._repr_html_()).rows
    assert rows[-1] == [f"{scale.value:.4g} examples", f"{scale.low:.4g} to {scale.high:.4g}"]
    assert len(Reader(Ledger()._repr_html_()).rows) == 1  # the head
    assert len(Reader(Ledger(norms=torch.ones(0))._repr_html_()).rows) == 1


def test_a_recipe_shows_the_keys_that_it_states():
    rows = read_rows(read_recipe(find_recipe("lenet-digits"), ["run.epochs=7"]))
    assert rows["model.name"] == ["lenet"]
    assert rows["run.epochs"] == ["7"]
    assert rows["optimizer.lr"] == ["0.05"]
    assert "batch.last" not in rows  # a default


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "<b>&"])
def test_no_name_becomes_markup(name):
    recipe = read_recipe(find_recipe("lenet-digits"))
    model = recipe.model.model_copy(update={"name": name})
    output = recipe.model_copy(update={"model": model})
    assert read_rows(output)["model.name"] == [name]
    tags = {"table", "caption", "tr", "th", "td"}
    assert Reader(output._repr_html_()).tags == tags
    ledger = Ledger(parameter_norms={name: torch.ones(2)})
    assert f"norm in {name}" in read_rows(ledger)
    assert Reader(ledger._repr_html_()).tags == tags
    assert "script" in Reader("<script></script>").tags  # the control
