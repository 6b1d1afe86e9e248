"""Batches as pytrees, and example losses: against plain indexing, one example at a time."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.batch import is_count
from anybatch.errors import BatchError
from anybatch.example_losses import ExampleLosses
from anybatch.pytree import Shared, Uncollated, count_examples, prepare_batch, take_examples
from properties import seeded_examples

seeded = seeded_examples(50)


class Pair(NamedTuple):
    left: Any
    right: Any


def nested(count):
    """Every kind of node; leaf k of example i holds 10 k + i."""
    return {
        "tensor": torch.arange(count),
        "pair": Pair(np.arange(count) + 10, (torch.arange(count) + 20,)),
        "rows": [torch.arange(count).repeat(3, 1).T + 30],
        "none": None,
        "shared": Shared({"table": torch.arange(99)}),
    }


def example(batch, i):
    pair = batch["pair"]
    leaves = batch["tensor"], pair.left, pair.right[0], batch["rows"][0][:, 0]
    return [int(leaf[i]) for leaf in leaves]


# ------------------------------------------------------------------------------------ pytrees


@seeded
@given(count=st.integers(0, 9), cut=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_a_piece_of_a_batch_holds_its_examples_and_is_a_batch(count, cut):
    start, stop = sorted(min(c, count) for c in cut)
    piece = take_examples(nested(count), start, stop)
    assert count_examples(piece) == stop - start
    got = [example(piece, i) for i in range(stop - start)]
    assert got == [[i, 10 + i, 20 + i, 30 + i] for i in range(start, stop)]
    assert isinstance(piece["pair"], Pair)
    assert piece["none"] is None
    assert len(piece["shared"].leaf["table"]) == 99


def test_pieces_are_views_where_leaves_allow():
    batch = nested(4)
    take_examples(batch, 1, 3)["tensor"].fill_(7)
    take_examples(batch, 1, 3)["pair"].left.fill(7)
    assert batch["tensor"].tolist() == [0, 7, 7, 3]
    assert batch["pair"].left.tolist() == [10, 7, 7, 13]


def test_the_model_gets_shared_leaves_unwrapped():
    got = prepare_batch(nested(2))
    assert len(got["shared"]["table"]) == 99
    assert isinstance(got["pair"].left, np.ndarray)


def test_tensors_go_to_the_device_and_what_is_none_stays():
    got = prepare_batch(nested(2), torch.device("meta"))
    assert {got["tensor"].device.type, got["shared"]["table"].device.type} == {"meta"}
    assert isinstance(got["pair"].left, np.ndarray)
    assert got["none"] is None


def test_examples_are_collated_a_micro_batch_at_a_time():
    def pad(examples):
        longest = max(map(len, examples))
        return torch.tensor([[*e, *[0] * (longest - len(e))] for e in examples])

    batch = Uncollated([[1], [2, 2], [3, 3, 3]], pad)
    assert count_examples(batch) == 3
    assert prepare_batch(take_examples(batch, 0, 2)).tolist() == [[1, 0], [2, 2]]
    assert prepare_batch(take_examples(batch, 2, 3)).tolist() == [[3, 3, 3]]
    assert prepare_batch(batch).shape == (3, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), r"batch\[0\] has 3, batch\[1\] has 4.*ab\.Shared"),
        ((), "of type tuple, holds no tensor and no array"),
        ({"a": None}, "of type dict, holds no tensor and no array"),
        (Shared(torch.zeros(3)), "holds no tensor and no array"),
        ((torch.zeros(3), torch.tensor(1.0)), r"batch\[1\] is a tensor of shape \(\).*Shared"),
        ((torch.zeros(3), 0.1), r"batch\[1\] is the number 0\.1.*ab\.Shared\(\.\.\.\)"),
        ({"text": ["a", "b"]}, r"batch\['text'\]\[0\] is of type str.*collate"),
    ],
)
def test_what_has_no_examples_first_is_refused(batch, message):
    with pytest.raises(BatchError, match=message):
        count_examples(batch)


def test_a_count_is_an_integer_of_at_least_one():
    assert all(map(is_count, [1, 10**12, np.int64(7), np.uint8(1)]))
    assert not any(map(is_count, [0, -1, True, np.True_, 2.0, math.nan, "3", None, np.int64(0)]))


# ------------------------------------------------------------------------------- example losses


@seeded
@given(
    pairs=st.lists(
        st.tuples(st.floats(-9, 9, width=32), st.sampled_from([0, 1, 3, 0.5])), min_size=1
    ),
    rows=st.booleans(),
)
def test_means_are_each_value_over_its_count_and_zero_without_one(pairs, rows):
    values, counts = torch.tensor(pairs).T
    losses = ExampleLosses(values[:, None].repeat(1, 2) if rows else values, counts)
    expected = [float(np.float32(v) / np.float32(n)) if n > 0 else 0.0 for v, n in pairs]
    assert losses.means.tolist() == ([[m, m] for m in expected] if rows else expected)
    assert losses.present.tolist() == [n > 0 for _, n in pairs]


def test_the_mean_of_an_example_without_a_count_is_zero_whatever_its_value():
    values = torch.tensor([math.nan, math.inf, 3.0])
    losses = ExampleLosses(values, torch.tensor([0, 0, 2]))
    assert losses.means.tolist() == [0, 0, 1.5]


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_without_counts_each_example_counts_one(shape):
    losses = ExampleLosses(torch.full(shape, 2.0, dtype=torch.float64))
    assert losses.weights.tolist() == [1, 1, 1]
    assert losses.weights.dtype == torch.float64
    assert losses.present.all()
    assert torch.equal(losses.means, losses.values)


def test_a_change_reaches_every_tensor_that_there_is():
    losses = ExampleLosses(torch.ones(2), torch.ones(2), torch.ones(2), {"a": torch.ones(2)})
    changed = losses.map(lambda tensor: tensor + 1)
    tensors = changed.values, changed.counts, changed.groups, changed.metrics["a"]
    assert all(tensor.tolist() == [2, 2] for tensor in tensors)
    bare = ExampleLosses(torch.ones(2)).map(lambda tensor: tensor + 1)
    assert bare.values.tolist() == [2, 2]
    assert (bare.counts, bare.groups, bare.metrics) == (None, None, {})
