"""Data in recipes: its parts, official test sets, data sets of the user's, sample weights.

Oracles: set arithmetic on the ids, and weighted sums by hand in NumPy float64.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anybatch.data import Examples, MapStyle, as_data_set, concatenate
from anybatch.data.data_set import move_to_device
from anybatch.errors import DataError
from anybatch.recipe.build import Setup, build
from anybatch.recipe.runs import create_run
from anybatch.recipe.train import Progress, train
from anybatch.runs.records import read_records
from command_line import recipe, run_command, write_module, write_recipe


def make_setup(*, allow_code: bool = False, **keys: Any) -> Setup:
    return build(recipe(**keys), allow_code=allow_code)


def train_recipe(folder: Path, result: Setup) -> list[Progress]:
    with create_run(result.recipe, folder) as run:
        return list(train(result, run))


def save_npz(path: Path, size: int = 40, seed: int = 0, **others: Any) -> str:
    draws = np.random.default_rng(seed)
    arrays = {"inputs": draws.normal(size=(size, 4)), "targets": np.arange(size) % 3} | others
    np.savez(path, **arrays)
    return str(path)


def test_train_validation_and_held_out_are_a_partition_and_what_is_held_out_stays():
    with_three, with_two = make_setup(**{"data.validation": 0.25}), make_setup()
    train_ids, validation, held_out = (set(ids.tolist()) for ids in with_three.splits)
    assert len(train_ids) + len(validation) + len(held_out) == 1797
    assert train_ids | validation | held_out == set(range(1797))
    assert held_out == set(with_two.splits.held_out.tolist())
    classes = torch.bincount(with_three.data.targets[with_three.splits.validation])
    assert (classes - torch.bincount(with_three.data.targets) / 4).abs().max() <= 0.5  # stratified
    visited = {int(i) for step in range(5) for i in with_three.order.indices(step)}
    assert visited <= train_ids
    assert len(with_two.splits.validation) == 0


def test_each_epoch_is_judged_by_validation_and_the_end_by_what_is_held_out(tmp_path):
    result = make_setup(**{"data.validation": 0.1, "run.epochs": 3})
    progress = [p for p in train_recipe(tmp_path / "run", result) if p.evaluations]
    assert [sorted(p.evaluations) for p in progress] == [["validation"]] * 2 + [
        ["held_out", "validation"]
    ]
    rows = [r for r in read_records(tmp_path / "run" / "records.jsonl") if r["kind"] != "step"]
    splits = [row["split"] for row in rows if row["kind"] == "evaluation"]
    assert splits == ["validation"] * 3 + ["held_out"]
    assert progress[-1].held_out == result.evaluate("held_out")


def test_stopping_looks_at_the_validation_data(tmp_path):
    keys = {"data.validation": 0.2, "run.epochs": 50}
    stop = {"stop.metric": "accuracy", "stop.target": 0.8}
    result = make_setup(**keys, **stop)
    last = train_recipe(tmp_path / "run", result)[-1]
    assert last.stopped is not None
    assert last.evaluations["validation"].metrics["accuracy"] >= 0.8
    assert last.held_out is not None  # judged once, at the end


def test_a_part_can_be_evaluated_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, data={"validation": 0.1})
    run = run_command("train", path, "--json").report["run"]
    result = run_command("evaluate", run, "--split", "validation", "--json").report
    assert result["split"] == "validation"
    assert result["num_examples"] == 179  # a tenth of 1,797, rounded class by class


def test_held_out_data_can_be_a_file_of_their_own(tmp_path):
    train_file, test_file = tmp_path / "train.npz", tmp_path / "test.npz"
    save_npz(train_file, 40), save_npz(test_file, 15, seed=1)
    keys = {"data.name": "npz", "data.args": {"path": str(train_file)}, "batch.size": 8}
    keys |= {"model.args": {"inputs": [4], "classes": 3}, "data.held_out": {"path": str(test_file)}}
    result = make_setup(**keys)
    assert result.splits.train.tolist() == list(range(40))
    assert result.splits.held_out.tolist() == list(range(40, 55))
    inputs = torch.from_numpy(np.load(test_file)["inputs"]).float()
    assert torch.equal(result.select_split("held_out").columns[0], inputs)
    both = make_setup(**keys, **{"data.validation": 0.25})
    assert len(both.splits.validation) == 10  # a quarter of 14, 13 and 13, each rounded
    assert both.splits.held_out.tolist() == list(range(40, 55))


def test_data_go_to_the_device_of_the_model_where_they_fit():
    data = Examples.from_arrays(torch.rand(4, 3), torch.arange(4) % 2)  # 80 bytes
    meta = torch.device("meta")
    assert move_to_device(data, torch.device("cpu"), 10**9) is data
    assert move_to_device(data, meta, 159) is data
    assert [column.device for column in move_to_device(data, meta, 160).columns] == [meta, meta]
    rows = MapStyle([(torch.zeros(3), 0)])
    assert move_to_device(rows, meta, 10**9) is rows


def test_held_out_data_of_another_shape_or_kind_are_refused(tmp_path):
    first = Examples.from_arrays(torch.rand(4, 3), torch.arange(4) % 2)
    with pytest.raises(DataError, match=r"of shapes \[\(2,\), \(\)\]. .*\[\(3,\), \(\)\]"):
        concatenate(first, Examples.from_arrays(torch.rand(4, 2), torch.arange(4) % 2))
    with pytest.raises(DataError, match=r"loads MapStyle, and the other data are Examples"):
        concatenate(first, MapStyle([(torch.zeros(3), 0)]))


SETS = """
import torch
class Rows:
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return self.size
    def __getitem__(self, i):
        x = torch.linspace(0, 1, 4).roll(i % 3)
        return x.double(), i % 3
def rows(size=30):
    return Rows(size)
def arrays():
    return torch.rand(30, 4), torch.arange(30) % 3
def stream():
    return iter([1, 2])
"""


@pytest.mark.slow
def test_any_map_style_data_set_trains_evaluates_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "sets_of_mine", SETS)
    model = {"args": {"inputs": [4], "classes": 3}}
    sections = {"model": model, "data": {"name": "sets_of_mine:rows"}, "batch": {"size": 8}}
    path = write_recipe(tmp_path, run={"epochs": 40}, **sections)
    result = run_command("train", path, "--json").report
    assert result["held_out"]["accuracy"] == 1.0
    code = (result["run"], "--allow-code", "--json")
    rows = run_command("predict", *code).report["predictions"]
    assert [row["class"] for row in rows] == [row["example"] % 3 for row in rows]
    workers = run_command("train", path, "--set", "data.workers=2", "--json").report
    assert workers["training"] == result["training"]  # bit for bit


def test_what_is_no_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "sets_of_mine", SETS)
    with pytest.raises(DataError, match=r"returned a list_iterator. It must return a pair"):
        make_setup(allow_code=True, **{"data.name": "sets_of_mine:stream"})
    for wrong in (torch.rand(3), {"inputs": 1}, torch.nn.Sequential(), (1, 2, 3, 4)):
        with pytest.raises(DataError, match=r"It must return a pair"):
            as_data_set(wrong, "mine")


def test_sample_weights_weigh_losses_and_metrics(tmp_path):
    weights = np.array([0.0, 1.0, 2.5, 1.0] * 10)
    path = save_npz(tmp_path / "weighted.npz", weights=weights)
    keys = {"data.name": "npz", "data.args": {"path": path, "weights": "weights"}}
    keys |= {"model.args": {"inputs": [4], "classes": 3}, "run.dtype": "float64", "batch.size": 8}
    result = make_setup(**keys)
    ids = result.splits.held_out.numpy()
    arrays = np.load(path)
    linear = list(result.model.parameters())
    weight, bias = (p.detach().numpy() for p in linear)
    logits = arrays["inputs"][ids] @ weight.T + bias
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ours = -logs[np.arange(len(ids)), arrays["targets"][ids]]
    evaluated = result.evaluate("held_out")
    expected = (weights[ids] * ours).sum() / weights[ids].sum()
    assert evaluated.loss == pytest.approx(expected, rel=1e-12)  # float64, 8 terms
    assert abs(ours.mean() - expected) > 1e-3  # the control: the weights matter
    hits = logits.argmax(1) == arrays["targets"][ids]
    accuracy = (weights[ids] * hits).sum() / weights[ids].sum()
    assert evaluated.metrics["accuracy"] == pytest.approx(accuracy, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -2.0] * 20, "The weight of example 1 is -2. It must be at least 0"),
        ([0.0] * 40, "All weights are 0. At least one must be above 0"),
        ([1.0, np.nan] * 20, "weights hold nan in example 1"),
        (
            [1.0] * 39,
            r"weights are of shape \(39,\). There must be one .*: \(40,\)",
        ),
        (["a"] * 40, "weights are <U1 of shape"),
    ],
)
def test_wrong_sample_weights_are_refused(weights: Any, message: str, tmp_path: Path) -> None:
    path = save_npz(tmp_path / "weighted.npz", weights=np.array(weights))
    args = {"path": path, "weights": "weights"}
    with pytest.raises(DataError, match=message):
        make_setup(**{"data.name": "npz", "data.args": args})
