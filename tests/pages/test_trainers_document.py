"""Other trainers: what docs/performance.md says of them, and that they train the same networks."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from anybatch.zoo import gpt, lenet, mlp

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "performance.md").read_text(encoding="utf8")
pytestmark = pytest.mark.usefixtures("benchmark_modules")


def load() -> Any:
    path = ROOT / "benchmarks" / "results" / "trainers.json"
    return json.loads(path.read_text())["cases"]


def format_tables(cases: Any) -> str:
    return import_module("trainers").format_tables({"cases": cases})["trainers-cut"]


def test_cases_are_complete_and_cut_updates_exact() -> None:
    trainers, cases = import_module("trainers"), load()
    for part, expected in (("epochs", trainers.EPOCHS), ("cut", trainers.CUT)):
        assert list(cases[part]) == list(expected)
    distance = cases["distance"]
    assert distance["`ab.steps`"] < 1e-13  # of float64
    assert min(distance["Lightning"], distance["Accelerate"]) > 1e-3
    for case in (*cases["epochs"].values(), *cases["starts"].values()):
        for way, each in case["distances"].items():
            assert max(each.values()) < trainers.TOLERANCE, way


def test_a_ratio_is_bold_if_another_trainer_is_faster() -> None:
    cases = load()
    ratios = next(iter(cases["cut"].values()))["over_by_hand"]
    ratios |= {"`ab.steps`": 1.234, "Lightning": 1.3, "Accelerate": 1.25}
    assert "| 1.23 |" in format_tables(cases)
    ratios["Accelerate"] = 1.2
    assert "| **1.23** |" in format_tables(cases)


def list_figures(cases: Any, key: str, way: str, unit: float, digits: int) -> str:
    first, second, third = (
        f"{unit * case[key][way]:.{digits}f}" for case in cases["epochs"].values()
    )
    return f"{first}, {second} and {third}"


def test_what_the_prose_says_of_the_figures_is_true() -> None:
    words, cases = " ".join(DOCUMENT.split()), load()
    beyond = partial(list_figures, cases, "seconds_beyond_by_hand", unit=1e3, digits=0)
    assert f"takes {beyond('`ab.steps`')} ms beyond the loop by hand" in words
    assert f"without one {beyond('`ab.steps` without a run')} ms" in words
    wall = list_figures(cases, "wall_over_by_hand", "`ab.steps`", 1, 2)
    assert f"is at {wall}, since it waits" in words
    cut = [case["over_by_hand"] for case in cases["cut"].values()]
    perceptron, _, decoder = ((r["`ab.steps`"], r["Lightning"], r["Accelerate"]) for r in cut)
    assert perceptron[0] < min(perceptron[1:]) - 0.2
    assert decoder[0] < min(decoder[1:])


def make_case(module: Any, **changes: Any) -> Any:
    small = {"batch_size": 8, "num_examples": 20, "num_validation": 8}
    return module.Case(partial(mlp, [6], [8]), (6,), **{**small, **changes})


def test_ways_that_train_differently_are_noticed() -> None:
    trainers, ways = import_module("trainers"), import_module("trainers_ways")
    case = make_case(ways)
    names = ("by hand", "`ab.steps`", "`ab.steps` without a run")
    firsts = {
        name: trainers.train_module(ways.WAYS[name], case, pieces, True)
        for name, pieces in zip(names, (1, 3, 8), strict=True)
    }
    distances = trainers.check_training(case, firsts)
    assert set(distances["`ab.steps`"]) == {"train loss", "validation loss", "weights"}

    def train_on_half(model: Any, train: Any, *others: Any) -> Any:  # control
        return ways.run_by_hand(model, tuple(column[:10] for column in train), *others)

    def evaluate_wrong(model: Any, train: Any, held_out: Any, *others: Any) -> Any:  # control
        return ways.run_by_hand(model, train, train, *others)

    for wrong in (train_on_half, evaluate_wrong):
        firsts["wrong"] = trainers.train_module(wrong, case, 1, True)
        with pytest.raises(RuntimeError, match="wrong is away from the loop by hand"):
            trainers.check_training(case, firsts)


def test_starts_of_cases_are_equal_and_the_ragged_case_is_ragged() -> None:
    ways = import_module("trainers_ways")
    case = make_case(ways)
    (inputs, _), held_out = case.make_data()
    assert torch.equal(inputs, case.make_data()[0][0])
    assert [len(inputs), len(held_out[0])] == [20, 8]
    size, last = ways.RAGGED.batch_size, ways.RAGGED.num_examples % ways.RAGGED.batch_size
    assert 0 < last % (size // ways.PIECES) < size // ways.PIECES


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lenet", "block", "gpt"])
def test_layers_of_keras_compute_the_same_as_a_module(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    worker = import_module("trainers_keras")
    torch.manual_seed(0)
    module, inputs = {
        "lenet": lambda: (lenet(16), torch.rand(3, 1, 16, 16)),
        "block": lambda: (worker.Block(32, 64, 2), torch.rand(3, 32, 8, 8)),
        "gpt": lambda: (gpt(20, 8, 2, 2, 6), torch.randint(20, (3, 6))),
    }[kind]()
    for p in module.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # a norm's weights are all 1 at the start
    array = worker.prepare(inputs, "jax")
    entry, weights = keras.Input(array.shape[1:], dtype=str(array.dtype)), worker.Weights()
    model = keras.Model(entry, worker.build_layers(module, entry, weights))
    right = module(inputs).detach()
    if kind == "block":
        right = right.permute(0, 2, 3, 1)

    def compute_distance() -> float:
        logits = model(array).detach()
        return float((logits - right).norm() / right.norm())

    assert compute_distance() > 0.1  # control: weights of another start
    weights.assign()
    assert compute_distance() < 1e-5  # float32 sums of some hundred terms in another order
    assert len(model.trainable_variables) == len(list(module.parameters()))
