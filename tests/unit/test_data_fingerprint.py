"""A run keeps a fingerprint of its data, and goes on with no others without being told to.

The oracle is the change itself: each test changes data in one known way, and the control is the
same data read again, from another kind of memory or by another number of workers.
"""

import json
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import anybatch as ab
from anybatch.data import Examples, Sequences
from anybatch.errors import RunError
from anybatch.runs import data_fingerprint as module
from anybatch.runs.data_fingerprint import DATA, compute_fingerprint, find_differences
from anybatch.runs.settings import compare_ranks

N = 40


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Read the whole sample, on a busy machine too."""
    monkeypatch.setattr(module, "SECONDS", 60.0)


def tensors(n=N, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


class MapStyle:
    """A data set of the user's."""

    def __init__(self, n=N, change=None):
        self.columns = tensors(n)
        if change is not None:
            change(self.columns)

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        return tuple(column[index] for column in self.columns)


def change_one(columns):
    columns[0][17, 1] += 1e-3


def relabel_one(columns):
    columns[1][5] = 1 - columns[1][5]


def exchange_two(columns):
    columns[0][[3, 4]] = columns[0][[4, 3]]


def as_arrays(columns):
    return {"x": columns[0].numpy(), "y": columns[1].numpy()}


def as_list(columns):
    return list(zip(*columns, strict=True))


def as_sequences(columns):
    return Sequences.from_arrays(list(columns[0]), columns[1]).columns


KINDS = {
    "tensors": tuple,
    "data set of tensors": lambda columns: TensorDataset(*columns),
    "arrays": as_arrays,
    "list": as_list,
    "sequences": as_sequences,
    "map-style": lambda columns: MapStyle(
        change=lambda rank_fingerprint: [
            a.copy_(b) for a, b in zip(rank_fingerprint, columns, strict=True)
        ]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [change_one, relabel_one, exchange_two])
def test_a_changed_example_is_seen_and_the_same_data_are_not_refused(kind, change):
    before, again, other = tensors(), tensors(), tensors()
    change(other)
    first, second, third = (compute_fingerprint(KINDS[kind](c)) for c in (before, again, other))
    assert find_differences(json.loads(json.dumps(first)), second) == []
    assert find_differences(first, third) != []


@pytest.mark.parametrize("limit", ["HASHED_BYTES", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
def test_one_value_in_columns_too_large_to_be_hashed_is_seen(monkeypatch, limit, dtype):
    if limit != "none":
        monkeypatch.setattr(module, limit, 0)
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(module, "SAMPLE_SIZE", 4)
    column = torch.arange(3000).remainder(200).reshape(1000, 3).to(dtype)
    sampled = module._choose_ids(1000)
    row = next(i for i in range(1000) if i not in sampled)
    other = column.clone()
    other[row, 2] += 1
    before = compute_fingerprint((column,))
    assert find_differences(before, compute_fingerprint((column.clone(),))) == []
    assert find_differences(before, compute_fingerprint((other,))) == ["values of data[0] differ"]


def test_differences_are_told_in_words():
    before = compute_fingerprint(tensors())

    def report(data):
        return find_differences(before, compute_fingerprint(data))

    inputs, targets = tensors()
    assert report((inputs[:30], targets[:30])) == ["there are 30 examples, and there were 40"]
    assert report((inputs.double(), targets)) == [
        "example[0] is float64 of shape (3,), and it was float32 of shape (3,)"
    ]
    assert report((inputs.flip(0), targets.flip(0))) == [
        "the examples are in another order, from example 0 on"
    ]
    inputs[[7, 9]] += 1
    assert report((inputs, targets)) == ["examples 7, 9 of 40 sampled differ"]
    assert find_differences(
        compute_fingerprint(tensors(), parts={"held_out": torch.arange(3)}),
        compute_fingerprint(tensors(), parts={"held_out": torch.arange(4)}),
    ) == ["the held-out split holds other examples"]


@pytest.mark.parametrize(
    "draw",
    [torch.rand, lambda _: np.random.rand(), lambda _: random.random()],  # noqa: NPY002
)
def test_random_examples_say_nothing_of_values_and_generators_stay(draw):
    class Noisy(MapStyle):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + float(draw(1)), y

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    expected = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    first = compute_fingerprint(Noisy())
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert first["sample"] is None
    assert find_differences(first, compute_fingerprint(Noisy())) == []
    assert find_differences(first, compute_fingerprint(Noisy(30))) != []


def test_slow_and_failing_data_sets_do_not_hold_up_a_run(monkeypatch):
    class Slow(MapStyle):
        def __getitem__(self, index):
            time.sleep(0.01)
            return super().__getitem__(index)

    class Failing(MapStyle):
        def __getitem__(self, index):
            raise OSError("gone")

    monkeypatch.setattr(module, "SECONDS", 0.05)
    start = time.monotonic()
    some = compute_fingerprint(Slow(1000))
    assert time.monotonic() - start < 0.5
    assert 0 < len(some["sample"]) < 20 * module.DIGITS
    assert compute_fingerprint(Failing())["sample"] == ""
    monkeypatch.setattr(module, "SECONDS", 10)
    assert find_differences(some, compute_fingerprint(MapStyle(1000))) == []  # the part of both
    monkeypatch.setattr(module, "SLOW", 0.001)
    assert compute_fingerprint(Slow())["sample"] is None


def test_workers_read_the_sample_where_a_data_set_is_opened():
    class Opened(MapStyle):
        reads = 0

        def __getitem__(self, index):
            Opened.reads += 1
            return super().__getitem__(index)

    data = Opened()
    by_worker = compute_fingerprint(data, workers=1)
    assert Opened.reads == 0
    assert by_worker == compute_fingerprint(data)
    assert Opened.reads == 2 * N


def test_a_cache_on_disk_has_the_fingerprint_of_the_same_data_in_memory(tmp_path):
    pytest.importorskip("pyarrow")
    from anybatch.data import load_parquet

    table = __import__("pyarrow").table({"x": tensors()[0][:, 0].tolist(), "y": [0, 1] * (N // 2)})
    __import__("pyarrow.parquet").parquet.write_table(table, tmp_path / "rows.parquet")
    load = {"path": str(tmp_path / "rows.parquet"), "target": "y"}
    stored = load_parquet(**load, cache=str(tmp_path / "cache")).to(torch.float32)
    whole = load_parquet(**load).to(torch.float32)
    other = Examples(whole.inputs.roll(1, 0), whole.targets)
    first = compute_fingerprint(stored.columns)
    first["contents"].pop("data[0]")  # checksums of the rows, which memory has none of
    assert find_differences(first, compute_fingerprint(whole.columns)) == []
    assert find_differences(first, compute_fingerprint(other.columns)) != []


def train(run, data, *, updates=None):
    """Train a linear model on data, and leave after so many updates."""
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    objective = ab.Objective(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = ab.Order(len(data[0]), batch_size=8, seed=7)
    for step in ab.steps(model, objective, optimizer, data, order=order, epochs=2, run=run):
        if step.step + 1 == updates:
            step.save()
            break
    return step.step + 1


def test_steps_refuse_other_data_and_record_those_that_are_accepted(tmp_path):
    train(tmp_path, tensors(), updates=4)
    other = tensors()
    change_one(other)
    with pytest.raises(RunError, match=r"other data than these: example 17 of 40 sampled differs"):
        train(tmp_path, other)
    assert train(ab.Run(tmp_path, accept_data=True), other, updates=6) == 6
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    accepted = [row["accepted"] for row in rows if row["kind"] == "session" and "accepted" in row]
    assert accepted == [{"data": ["example 17 of 40 sampled differs"]}]
    with pytest.raises(RunError, match=r"example 17 of 40"):  # from now on those are the run's
        train(tmp_path, tensors())
    assert train(tmp_path, other) == 10


def test_accepted_data_may_have_more_examples(tmp_path):
    train(tmp_path, tensors(), updates=4)
    with pytest.raises(RunError, match="there are 48 examples, and there were 40"):
        train(tmp_path, tensors(48))
    assert train(ab.Run(tmp_path, accept_data=True), tensors(48)) == 12


def test_a_run_without_a_fingerprint_goes_on_with_a_word(tmp_path, caplog):
    old = ab.Run(tmp_path)
    old.data = {}  # as before there were any
    train(old, tensors(), updates=4)
    assert train(tmp_path, tensors(seed=1)) == 10
    assert [r.message for r in caplog.records if "fingerprint" in r.message] == [
        f"the checkpoint of {tmp_path} has no fingerprint of its data, so they are not compared."
    ]


def test_ranks_with_different_data_are_refused(monkeypatch):
    others = compute_fingerprint(tensors(seed=1))

    def fake_gather(tell, group):
        rank_fingerprint = tell()
        other = {
            **rank_fingerprint,
            "settings": {DATA: {key: others[key] for key in rank_fingerprint["settings"][DATA]}},
        }
        return [rank_fingerprint, other]

    monkeypatch.setattr("anybatch.runs.settings.distributed.all_gather_object", fake_gather)
    settings = {DATA: compute_fingerprint(tensors(), files=[__file__])}
    with pytest.raises(RunError, match=r"rank 1 begins with .* different data\. Give all ranks"):
        compare_ranks(nn.Linear(1, 1), settings, group=object())
    others = compute_fingerprint(tensors())  # the control: read from no file
    compare_ranks(nn.Linear(1, 1), settings, group=object())
