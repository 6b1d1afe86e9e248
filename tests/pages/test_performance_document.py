"""docs/performance.md against its raw results; counts of growth and roofline by closed forms."""

import json
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
pytestmark = pytest.mark.usefixtures("benchmark_modules")
NAMES = (
    *("loop", "compiled", "growth", "roofline", "observed_step", "bitwise", "self_check"),
    *("before_after", "integrations", "trainers", "cost"),
)


def load(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def find_numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the place of each number: its container, and its key or index."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from find_numbers(item)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield value, key


def test_all_tables_and_plots_are_those_of_the_raw_results() -> None:
    performance, fill = import_module("performance"), import_module("tables").fill_tables
    pages = [performance.build_page(name) for name in performance.SOURCES]
    tables = {name: table for page in pages for name, table in page[0].items()}
    assert fill(DOCUMENT, tables) == DOCUMENT
    for name, text in {name: text for page in pages for name, text in page[1].items()}.items():
        assert (ROOT / f"docs/performance/{name}.svg").read_text(encoding="utf8") == text
        assert f"(performance/{name}.svg)" in DOCUMENT


def test_only_the_table_of_the_first_minutes_is_typed_by_hand() -> None:
    place = import_module("tables").PLACE
    head, rest = place.sub("", DOCUMENT).split("\n## ", 1)
    tables = [section.split("\n")[0] for section in rest.split("\n## ") if "\n|---|" in section]
    assert tables == ["The first ten minutes"]
    assert "python benchmarks/loop.py" in head  # the table of commands


@pytest.mark.parametrize("name", NAMES)
def test_another_number_in_a_raw_result_is_noticed(name: str) -> None:
    performance, fill = import_module("performance"), import_module("tables").fill_tables
    for file in performance.SOURCES[name]:
        raw = load(file)
        content = raw.get("cases") or raw.get("axes") or raw["later_over_earlier"]
        for container, key in find_numbers(content):
            container[key] *= 3
        tables, _ = performance.build_page(name, **{file: raw})
        assert fill(DOCUMENT, tables, others=True) != DOCUMENT, file


def test_all_commands_of_the_page_are_benchmarks() -> None:
    performance = import_module("performance")
    assert set(NAMES) == set(performance.SOURCES)
    for name in NAMES:
        assert f"`python benchmarks/{name}.py" in DOCUMENT


def test_a_ratio_is_bold_if_it_misses_its_aim() -> None:
    format_ratio = import_module("tables").format_ratio
    ratios = format_ratio(1.104, 1.1), format_ratio(1.106, 1.1), format_ratio(1.106)
    assert ratios == ("1.10", "**1.11**", "1.11")


def test_what_the_prose_says_of_the_figures_is_true() -> None:
    words = " ".join(DOCUMENT.split())
    axes = load("growth")["axes"]
    for axis in ("batch", "width", "depth"):  # "both ratios come near 1 ... and fall"
        for way in ("gradient", "norms"):
            assert axes[axis][-1]["over by hand"][way] < axes[axis][0]["over by hand"][way]
    for axis in ("batch", "width"):
        assert max(axes[axis][-1]["over by hand"].values()) < 1.15
    cuts = [result["over by hand"]["norms"] for result in axes["micro_batches"]]
    assert cuts[-1] > cuts[0]
    cases = load("roofline")["cases"]
    assert {case["roof"] for case in cases.values()} == {"arithmetic"}
    perceptron, lenet, gpt, lstm = cases.values()
    assert min(gpt["share"]["steps"], lstm["share"]["steps"]) > 0.75
    assert all(0.25 < share < 0.45 for share in lenet["share"].values())
    assert perceptron["seconds"]["by hand"] > 2 * perceptron["attainable_seconds"]
    small = load("loop")["cases"]["784-128-10, B=64"]
    assert small["steps_microseconds"] - small["by_hand_microseconds"] < 1000
    overlap = load("overlap")["links"]["1gbit"]
    waiting = next(case for name, case in overlap.items() if "wait" in name)
    assert f"takes {waiting['over at the end']['overlapped'][1]:.2f} of its time" in words
    assert f"grows by {100 * (load('soak')['growth'] - 1):.1f} %" in words


def test_what_the_readme_says_of_the_figures_is_true() -> None:
    words = " ".join((ROOT / "README.md").read_text(encoding="utf8").split())
    loop, steps = load("loop")["cases"], load("observed_step")["cases"]
    small, lenet = loop["784-128-10, B=64"], loop["LeNet 28x28, B=128"]
    assert round(lenet["ratio"], 1) == 1.0
    ratio = f"{small['ratio']:.1f} times as long for a network whose step takes a millisecond"
    assert ratio in words
    norms = [case["over_unobserved"]["observed"] for case in steps.values()]
    norms += [small["observed_over_steps"], lenet["observed_over_steps"]]
    assert f"it takes {min(norms):.1f} to {max(norms):.1f} times as long as without" in words


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
