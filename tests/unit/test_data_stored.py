"""Rows in files are the numbers that were written, in any order; models train on them.

The oracle for numbers is NumPy's indexing of what was written into the Parquet file; tolerance
none: bytes are copied, and a cast is torch's on both sides.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch.data import as_data_set, load_parquet, parquet
from anybatch.data.data_set import drop_weights
from anybatch.errors import DataError
from anybatch.examples import Rows
from properties import seeded_examples
from small_caches import folder_of, numbers, read_cached, rows_of, write_source

KINDS = ("u1", "i2", "u2", "i4", "u4", "i8", "f2", "f4", "f8", "?")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are made some rows at a time."""
    monkeypatch.setattr(parquet, "PIECE_BYTES", 100)


@seeded_examples(25)
@given(
    st.data(),
    st.integers(1, 30),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.sampled_from(KINDS),
)
def test_rows_are_read_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: Any, count: int, shape: list[int], kind: str
) -> None:
    inputs = numbers((count, *shape), kind)
    path = write_source(tmp_path_factory.mktemp("stored") / "t.parquet", inputs)
    examples = read_cached(path)
    assert (folder_of(path) / "rows.bin").read_bytes() == inputs.tobytes()  # in its own dtype
    dtype = np.float64 if kind == "f8" else np.float32
    some = st.lists(st.integers(0, count - 1), max_size=40)
    for ids in (data.draw(some), list(range(count)), list(range(count - 1, -1, -1))):
        rows = examples.inputs.rows(torch.tensor(ids, dtype=torch.long))
        expected = inputs[ids].astype(dtype)
        assert rows.numpy().dtype == dtype
        assert rows.numpy().tobytes() == expected.tobytes()
    choice = torch.tensor(data.draw(some), dtype=torch.long)
    part = examples.select(choice)
    assert part.targets.tolist() == choice.tolist()
    assert len(part) == len(choice)
    again = part.select(torch.arange(len(part)).flip(0))
    assert np.array_equal(rows_of(again).numpy(), inputs[choice.tolist()[::-1]].astype(dtype))


def test_a_cast_is_that_of_torch_and_refuses_what_is_too_large(tmp_path: Path) -> None:
    inputs = np.array([[0.1, 7e4], [-2.5, 1e-9]])
    examples = read_cached(write_source(tmp_path / "t.parquet", inputs, w=[0.1, 1.0]), weights="w")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cast = examples.to(dtype)
        assert torch.equal(rows_of(cast), torch.from_numpy(inputs).to(dtype))
        assert cast.weights is not None
        assert cast.weights.dtype == dtype
        assert cast.targets.dtype == torch.int64
    with pytest.raises(DataError, match=r"numbers up to 70000. torch.float16 cannot"):
        examples.to(torch.float16)


def test_a_cache_is_a_data_set_like_the_others(tmp_path: Path) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((9, 2)), w=np.arange(9.0))
    whole, examples = load_parquet(path, "y", "x", weights="w"), read_cached(path, weights="w")
    assert as_data_set(examples, "parquet") is examples
    assert isinstance(examples.inputs, Rows)
    assert examples.collate is None
    inputs, targets, weights = examples.columns
    assert inputs is examples.inputs
    assert torch.equal(rows_of(examples), whole.inputs)
    assert torch.equal(targets, whole.targets)
    assert whole.weights is not None
    assert torch.equal(weights, whole.weights)
    assert len(drop_weights(examples).columns) == 2


def train_on(data: Any, **options: Any) -> tuple[list[float], float]:
    """Losses of a training, and the loss over all data."""
    torch.manual_seed(0)
    model = nn.Linear(3, 40)

    def losses(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    objective, order = ab.Objective(losses), ab.Order(40, batch_size=16, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = ab.steps(model, objective, optimizer, data, order=order, epochs=2, **options)
    return [step.loss for step in steps], ab.evaluate(model, objective, data).loss


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_model_trains_on_rows_in_files_to_the_same_bits(
    tmp_path: Path, micro_batch: int | None
) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((40, 3)))
    layout = ab.Layout(micro_batch=micro_batch)
    whole, examples = load_parquet(path, "y", "x"), read_cached(path)
    assert train_on(examples.columns, layout=layout) == train_on(whole.columns, layout=layout)
    moved = (whole.inputs.roll(1, 0), whole.targets)  # the control: the right rows matter
    assert train_on(moved, layout=layout) != train_on(whole.columns, layout=layout)


def test_neighbours_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = read_cached(write_source(tmp_path / "t.parquet", numbers((40, 3))))
    reads: list[tuple[int, int]] = []

    def count_calls(descriptor: int, buffers: Any, offset: int) -> int:
        reads.append((offset // 12, len(buffers)))
        return actual(descriptor, buffers, offset)

    actual = os.preadv
    monkeypatch.setattr(os, "preadv", count_calls)
    for ids, expected in (
        (list(range(40)), [(0, 40)]),
        ([7, 5, 6, 20], [(5, 3), (20, 1)]),
        ([3, 3, 4, 1], [(1, 1), (3, 1), (3, 2)]),
    ):
        reads.clear()
        examples.inputs.rows(torch.tensor(ids))
        assert reads == expected


def test_the_disk_is_told_a_batch_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = read_cached(write_source(tmp_path / "t.parquet", numbers((40, 3))))
    report: list[int] = []

    def count_calls(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        report.extend(range(offset // 12, (offset + length) // 12))

    monkeypatch.setattr(os, "posix_fadvise", count_calls)
    order = ab.Order(40, batch_size=16, seed=1)
    for batch in ab.batches(examples.columns, order, stop=3):
        expected = [batch.ids] if batch.step == 2 else [batch.ids, order.indices(batch.step + 1)]
        assert sorted(report) == sorted(torch.cat(expected).tolist())
        report.clear()
    examples.inputs.path.unlink()
    examples.inputs.prefetch(torch.tensor([0]))  # what is wrong is said when it is read


def test_ids_that_are_none_of_the_rows_are_an_index_error(tmp_path: Path) -> None:
    examples = read_cached(write_source(tmp_path / "t.parquet", numbers((4, 3)))).inputs
    for ids in ([4], [-1, 0]):
        with pytest.raises(IndexError, match=r"must be from 0 to 3"):
            examples.rows(torch.tensor(ids))
