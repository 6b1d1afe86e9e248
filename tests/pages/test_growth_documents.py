"""Growth and roofline in docs/performance.md against their raw results; counts by closed forms."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anybatch.zoo import mlp

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "performance.md").read_text(encoding="utf8")


@pytest.fixture(autouse=True)
def _use_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (ROOT / "benchmarks" / f"{name}.py").exists():
            del sys.modules[name]


def load(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_table_and_plots_of_growth_are_those_of_the_raw_result() -> None:
    growth, fill = import_module("growth"), import_module("tables").fill_tables
    axes = load("growth")["axes"]
    assert list(axes) == list(growth.AXES)
    assert fill(DOCUMENT, {"growth": growth.format_growth(axes)}, others=True) == DOCUMENT
    for name, text in growth.draw_growth(axes).items():
        assert (ROOT / f"docs/performance/{name}.svg").read_text(encoding="utf8") == text
        assert f"(performance/{name}.svg)" in DOCUMENT
    words = " ".join(DOCUMENT.split())
    for results in axes.values():
        first, last = results[0]["over by hand"], results[-1]["over by hand"]
        (gradient, norms) = (
            f"{first[way]:.2f} to {last[way]:.2f}" for way in ("gradient", "norms")
        )
        assert f"from {gradient}, with norms from {norms}." in words
    one, _, sixteen = (result["seconds"]["by hand"] for result in axes["batch"][:3])
    assert f"16 examples take {sixteen / one:.1f} times the time of one" in words
    axes["width"][0]["over by hand"]["norms"] += 1  # control
    assert fill(DOCUMENT, {"growth": growth.format_growth(axes)}, others=True) != DOCUMENT


def test_the_tables_and_the_plot_of_the_roofline_are_those_of_the_raw_result() -> None:
    roofline, fill = import_module("roofline"), import_module("tables").fill_tables
    result = load("roofline")
    assert fill(DOCUMENT, roofline.format_roofline(result), others=True) == DOCUMENT
    for name, text in roofline.draw_roofline(result).items():
        assert (ROOT / f"docs/performance/{name}.svg").read_text(encoding="utf8") == text
    peak, bandwidth = result["peak_flops"] / 1e9, result["bandwidth"] / 1e9
    words = " ".join(DOCUMENT.split())
    assert f"{peak:.0f} GFLOP/s and {bandwidth:.0f} GB/s" in words
    assert f"above {peak / bandwidth:.1f} FLOP a byte" in words
    perceptron, lenet, gpt, lstm = result["cases"].values()
    assert {case["roof"] for case in result["cases"].values()} == {"arithmetic"}
    assert min(gpt["share"]["steps"], lstm["share"]["steps"]) > 0.75
    assert all(0.3 < share < 0.4 for share in lenet["share"].values())
    assert f"needs {1e3 * perceptron['attainable_seconds']:.1f} ms of arithmetic" in words
    added = perceptron["seconds"]["steps"] - perceptron["seconds"]["by hand"]
    assert f"`ab.steps`, {1e3 * added:.1f} ms in this run" in words
    perceptron["share"]["steps"] += 0.1  # control
    assert fill(DOCUMENT, roofline.format_roofline(result), others=True) != DOCUMENT


def test_a_table_without_a_place_is_refused() -> None:
    tables = import_module("tables")
    with pytest.raises(ValueError, match="has the tables"):
        tables.fill_tables(DOCUMENT, {"nowhere": ""}, others=True)


@pytest.mark.parametrize("changes", [{}, {"micro_batches": 3, "batch": 6}, {"depth": 5}])
def test_all_ways_make_the_same_gradient(changes: dict[str, int]) -> None:
    growth = import_module("growth")
    update = growth.Update(**{"batch": 6, "width": 16, **changes})
    # float32 sums of a few hundred terms; another order changes their last digits
    assert max(growth.compare_gradients(update).values()) < 1e-5


def test_gradients_of_other_examples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = import_module("growth")  # control
    build = growth.build_ways

    def build_others(update: Any, group: Any = None) -> Any:
        other, ways = build(growth.Update(batch=update.batch * 2, width=update.width), group)
        return other, {"by hand": ways["by hand"]} | {
            name: way for name, way in build(update, group)[1].items() if name != "by hand"
        }

    monkeypatch.setattr(growth, "build_ways", build_others)
    update = growth.Update(batch=6, width=16)
    assert min(growth.compare_gradients(update).values()) > 0.01


@pytest.mark.parametrize(("low", "high"), [(0.3, 132.7), (1.8, 49.9), (5, 5)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = import_module("svg").find_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert all(ticks[0] < tick for tick in ticks[1:])
    assert len(ticks) <= 9


def test_products_and_bytes_of_a_perceptron_are_those_of_its_equations() -> None:
    roofline = import_module("roofline")
    batch, inputs, hidden, classes = 4, 6, 8, 10
    data = torch.rand(batch, inputs), torch.randint(classes, (batch,))
    # Forward, gradients of weights and of inputs, which the first layer does not need.
    products = 2 * batch * (2 * inputs * hidden + 3 * hidden * classes)
    model = mlp([inputs], [hidden])
    assert roofline.count_flops(model, data) == products
    assert products != 6 * batch * (inputs * hidden + hidden * classes)  # control
    weights = 4 * (inputs * hidden + hidden + hidden * classes + classes)
    terms = roofline.count_bytes(mlp([inputs], [hidden]), data)
    assert terms["parameters"] == 4 * weights
    assert terms["gradients"] == terms["optimiser state"] == 2 * weights
    assert terms["inputs"] == 2 * (4 * batch * inputs + 8 * batch)
    # The output of ReLU, the logarithms of probabilities, and the total weight of the targets.
    assert terms["activations"] == 2 * 4 * (batch * hidden + batch * classes + 1)


def test_products_of_a_recurrence_and_of_attention_are_counted() -> None:
    roofline = import_module("roofline")
    steps, batch, inputs, hidden = 5, 3, 128, 256
    data = torch.rand(batch, steps, inputs), torch.randint(10, (batch,))
    forward = 2 * batch * steps * 4 * hidden * (inputs + hidden)
    # Neither the inputs nor the first hidden state, which is 0, need a gradient.
    unused = 2 * batch * 4 * hidden * (steps * inputs + hidden)
    head = 3 * 2 * batch * hidden * 10
    assert roofline.count_flops(roofline.LastOutput(), data) == 3 * forward - unused + head

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0][:, 0]

    length = 7
    data = torch.rand(batch, length, 8), torch.randint(8, (batch,))
    products = 2 * batch * length * 8 * 4 * 8 * 3  # of queries, keys, values and outputs
    unused = 2 * batch * length * 8 * 3 * 8
    whole = 2 * 2 * batch * length**2 * 8 * 3
    assert roofline.count_flops(Attend(), data) == products - unused + whole
