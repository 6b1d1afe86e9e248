"""Held-out parts of any kind of data, ragged data of one's own, and data that can hardly be meant.

The oracle is the list of examples that the test writes; the control is a part on its own.
"""

import logging

import numpy as np
import pytest
import torch

import anybatch as ab
from anybatch.data import Examples, MapStyle, Sequences, load_npz, load_parquet
from anybatch.data.data_set import concatenate
from anybatch.errors import DataError, RecipeError
from anybatch.examples import make_reader
from anybatch.recipe.build import build
from command_line import anybatch, recipe, refuse, run_command, write_module, write_recipe

RAGGED = """
import torch
import anybatch as ab
class Texts:
    collate = ab.Pad()
    def __init__(self, part):
        self.texts = [torch.full((2 + i % 3,), i % 5) for i in range(24 if part == "train" else 9)]
        self.labels = [i % 2 for i in range(len(self.texts))]
    def __len__(self):
        return len(self.texts)
    def __getitem__(self, i):
        return self.texts[i], self.labels[i]
def texts(part="train"):
    return Texts(part)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.out = torch.nn.Linear(4, 2)
    def forward(self, padded):
        mask = padded.mask[..., None]
        found = self.embedding(padded.values) * mask
        return self.out(found.sum(1) / mask.sum(1))
"""


def test_ragged_data_of_ones_own_train_and_are_judged_by_their_official_test_part(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "ragged_of_ones_own", RAGGED)
    write_recipe(
        tmp_path,
        model={"name": "ragged_of_ones_own:Model"},
        data={"name": "ragged_of_ones_own:texts", "held_out": {"part": "test"}},
        batch={"size": 6},
    )
    run_command("train", "recipe.toml", "--out", "run")
    examples = run_command("predict", "run", "--allow-code", "--json").report
    assert [row["example"] for row in examples["predictions"]] == list(range(24, 33))


def examples_of(data):
    read = make_reader(data.columns, raw=True)
    return [[t.tolist() for t in one] for one in read(torch.arange(len(read_ids(data))))]


def read_ids(data):
    columns = data.columns
    return columns[0] if isinstance(columns, tuple) else columns


def as_examples(x, y):
    return Examples.from_arrays(x, y)


def as_sequences(x, y):
    return Sequences.from_arrays([row[: 1 + i % 3] for i, row in enumerate(x)], y)


def as_map_style(x, y):
    return MapStyle([(torch.tensor(a), torch.tensor(b)) for a, b in zip(x, y, strict=True)])


def store_in(folder):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def as_stored(x, y):
        path = folder / f"rows-{len(x)}.parquet"
        parquet.write_table(arrow.table({"x": list(x), "y": y}), path)
        return load_parquet(str(path), "y", cache=str(folder / "cache")).to(torch.float64)

    return as_stored


@pytest.mark.parametrize("kind", ["examples", "sequences", "map-style", "stored"])
def test_a_part_follows_the_other_in_every_kind_of_data(tmp_path, kind):
    make = {
        "examples": as_examples,
        "sequences": as_sequences,
        "map-style": as_map_style,
        "stored": store_in(tmp_path),
    }[kind]
    generator = np.random.default_rng(0)
    first = make(generator.normal(size=(7, 3)), np.arange(7) % 2)
    second = make(generator.normal(size=(4, 3)), np.arange(4) % 2)
    both = concatenate(first, second)
    expected = examples_of(first) + examples_of(second)
    assert examples_of(both) == expected
    ids = torch.tensor([9, 0, 7, 6])
    assert examples_of(both.select(ids)) == [expected[i] for i in ids]
    assert examples_of(both.select(ids).select(ids[-1:] - 5)) == [expected[0]]


def test_data_of_two_kinds_or_shapes_do_not_join():
    ragged, fixed = as_sequences(np.ones((4, 3)), [0] * 4), as_examples(np.ones((4, 3)), [0] * 4)
    with pytest.raises(DataError, match="loads Sequences, and the other data are Examples"):
        concatenate(fixed, ragged)
    with pytest.raises(DataError, match=r"of shapes .*\(2,\)"):
        concatenate(ragged, Sequences.from_arrays([np.ones((2, 2))] * 4, [0] * 4))


@pytest.mark.parametrize("held_out", [{}, {"path": "rows.npz"}])
def test_what_is_trained_on_is_not_held_out(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", inputs=np.random.default_rng(0).normal(size=(20, 4)), targets=[0, 1] * 10)
    keys = {"data.name": "npz", "data.args": {"path": "rows.npz"}, "data.held_out": held_out}
    with pytest.raises(DataError, match="loads the examples to train on once more"):
        build(recipe(**keys), allow_code=False)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"data.name": "csv", "data.args": {"path": 3, "target": "y"}}, "data.args.path = 3 is an"),
        ({"data.name": "csv", "data.args": {"path": "a", "target": ["y"]}}, "args.target = .*list"),
        ({"optimizer.args": {"momentum": "0.9"}}, "optimizer.args.momentum = '0.9' is text"),
        ({"model.args": {"classes": "10"}}, "model.args.classes = '10' is text"),
        ({"order.name": "by_length", "order.args": {"window": "8"}}, "order.args"),
        ({"objective.reduction": {"name": "tilted", "t": "2"}}, "objective.reduction.t"),
        ({"objective.reduction": {"name": "mean", "scale": 0}}, "reduction.scale = 0"),
        ({"data.name": "Digits"}, "did you mean 'digits'"),
        ({"model.name": "SoftmaxRegression"}, "did you mean 'softmax_regression'"),
        ({"optimizer.args": {"Momentum": 0.9}}, "did you mean 'momentum'"),
    ],
)
def test_wrong_arguments_are_named_by_their_key(keys, named):
    with pytest.raises(RecipeError, match=named) as refusal:
        build(recipe(**keys), allow_code=False)
    assert "TypeError" not in str(refusal.value)


def test_out_of_memory_is_told_as_such(monkeypatch):
    def load():
        raise MemoryError

    monkeypatch.setitem(ab.data.sources, "digits", load)
    with pytest.raises(DataError, match=r"do not fit in memory\. .*Parquet.*cache = true"):
        build(recipe(), allow_code=False)


def test_decay_twice_and_a_single_class_are_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    penalty = [{"kind": "L2", "strength": 0.1}]
    decay = {"weight_decay": 0.1}
    for keys, warned in (
        ({"objective.penalty": penalty, "optimizer.args": decay}, True),
        ({"objective.penalty": penalty}, False),
        ({"optimizer.args": decay}, False),
    ):
        caplog.clear()
        build(recipe(**keys), allow_code=False)
        assert any("decay twice" in message for message in caplog.messages) == warned
    np.savez("rows.npz", inputs=np.random.default_rng(0).normal(size=(20, 4)), targets=[1] * 20)
    keys = {"data.name": "npz", "data.args": {"path": "rows.npz"}}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        keys |= {"model.args": {"inputs": [4], "classes": 3}, "batch.size": 4}
        build(recipe(**keys), allow_code=False)
    assert any("are of class 1" in message for message in caplog.messages)


def test_images_of_bytes_get_a_channel_and_are_scaled(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = str(tmp_path / "images.npz")
    np.savez(path, inputs=images, colours=colours, table=images[:, 0], targets=np.arange(6))
    examples = load_npz(path).inputs
    assert examples.shape == (6, 1, 8, 8)
    assert examples[2, 0, 3, 4].item() == pytest.approx(images[2, 3, 4] / 255)
    colour = load_npz(path, "colours").inputs
    assert colour.shape == (6, 3, 8, 8)
    assert colour[2, 1, 3, 4].item() == pytest.approx(colours[2, 3, 4, 1] / 255)
    assert load_npz(path, "table").inputs.tolist() == images[:, 0].tolist()  # no images
    assert load_npz(path, scale=1).inputs.max() > 1
    with pytest.raises(DataError, match=r"scale = 0\. It must be a number above 0"):
        load_npz(path, scale=0)


def test_hidden_files_are_left_out_and_partitions_are_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"x": [1.0, 2.0], "y": [0, 1]})
    for name in ("year=2020", "year=2021", ".hidden", "_delta"):
        (tmp_path / "rows" / name).mkdir(parents=True)
    for name in ("year=2021/b", "year=2020/a", "year=2020/.c", ".hidden/d", "_delta/e"):
        parquet.write_table(table, tmp_path / "rows" / f"{name}.parquet")
    (tmp_path / "rows/.DS_Store").write_bytes(b"no table")
    (tmp_path / "rows/._a.parquet").write_bytes(b"no table")
    expected = [[1, 2020], [2, 2020], [1, 2021], [2, 2021]]
    path = str(tmp_path / "rows")
    assert load_parquet(path, "y").inputs.tolist() == expected
    stored = load_parquet(path, "y", cache=str(tmp_path / "cache"))
    assert stored.inputs.rows(torch.arange(4)).tolist() == expected
    assert load_parquet(path, "year", "x").targets.tolist() == [2020, 2020, 2021, 2021]


def test_the_command_line_says_so_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, data={"held_out": {}})
    assert "once more" in refuse("train", "recipe.toml", "--out", "run")
    assert anybatch("train", "recipe.toml", "--set", "data.held_out=0.2", "--out", "run").code == 0
