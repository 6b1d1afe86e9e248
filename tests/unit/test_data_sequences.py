"""Ragged sequences in memory.

Oracle: the Python lists that they are made from.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
from anybatch.data.sequences import Sequences
from anybatch.errors import DataError
from anybatch.zoo.gru import gru_classifier
from anybatch.zoo.losses import cross_entropy
from properties import seeded_examples

RAGGED = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6)


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return values and offsets, after values of other sequences as in a slice of Arrow."""
    return np.array([77, *(x for row in rows for x in row)]), np.cumsum([1, *map(len, rows)])


def as_lists(data: Sequences) -> list[list[Any]]:
    return [[part.tolist() for part in example] for example in data]


@given(RAGGED, st.booleans())
@seeded_examples(60)
def test_examples_are_the_sequences_with_their_targets(rows: list[list[int]], pair: bool) -> None:
    targets, weights = [len(row) for row in rows], [0.5 * sum(row) + 1 for row in rows]
    data = Sequences.from_arrays(flat(rows) if pair else rows, targets, weights, tokens=True)
    assert len(data) == len(rows)
    assert as_lists(data) == [list(one) for one in zip(rows, targets, weights, strict=True)]
    assert data.lengths.tolist() == targets
    some = torch.arange(len(rows)).flip(0)[::2]
    assert as_lists(data.select(some)) == [as_lists(data)[i] for i in some.tolist()]
    fetched = data.__getitems__(some.tolist())
    assert [[p.tolist() for p in e] for e in fetched] == as_lists(data.select(some))


@given(RAGGED, st.booleans())
@seeded_examples(60)
def test_each_value_may_have_a_target(rows: list[list[int]], pair: bool) -> None:
    doubled = [[2 * x for x in row] for row in rows]
    rows_and_targets = [flat(rows), flat(doubled)] if pair else [rows, doubled]
    data = Sequences.from_arrays(*rows_and_targets, tokens=True, target_each_value=True)
    assert data.targets is None
    assert as_lists(data) == [list(one) for one in zip(rows, doubled, strict=True)]
    last = torch.tensor([len(rows) - 1])
    assert as_lists(data.select(last)) == [[rows[-1], doubled[-1]]]


def test_kinds_of_numbers_are_those_of_examples_in_memory() -> None:
    rows = [[1, 2], [3]]
    assert Sequences.from_arrays(rows, [0, 1], tokens=True).values.dtype == torch.int64
    assert Sequences.from_arrays(rows, [0, 1]).values.dtype == torch.float32  # the control
    wide = Sequences.from_arrays([np.ones((2, 3)), np.zeros((1, 3))], [0.5, 1.5], [1, 0])
    assert wide.values.dtype == torch.float64
    assert wide[0][0].shape == (2, 3)
    narrow = wide.to(torch.float32)
    assert {x.dtype for x in narrow[1]} == {torch.float32}
    assert wide[1][2].item() == 0  # a single weight of 0 is legal
    tokens = Sequences.from_arrays(rows, rows, tokens=True, target_each_value=True)
    tokens = tokens.to(torch.float64)
    assert {x.dtype for x in tokens[0]} == {torch.int64}


def test_what_is_given_is_copied() -> None:
    values = np.ones(3, np.float32)
    data = Sequences.from_arrays((values, np.array([0, 1, 3])), [0, 1])
    values[:] = 7
    assert as_lists(data) == [[[1.0], 0], [[1.0, 1.0], 1]]


def test_training_pads_each_micro_batch_and_learns() -> None:
    """Draw sequences whose class is their last token, one of two; a guess is right for half."""
    draws = np.random.default_rng(0)
    rows = [draws.integers(0, 2, draws.integers(1, 12)) for _ in range(100)]
    data = Sequences.from_arrays(rows, [row[-1] for row in rows], tokens=True)
    torch.manual_seed(0)
    model = gru_classifier(2, 8, 2, embedding=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    visited = []
    model.register_forward_pre_hook(lambda _, args: visited.append(args[0].values.shape))
    for _ in ab.steps(
        model,
        ab.Objective(cross_entropy),
        optimizer,
        data.columns,
        order=ab.Order(len(data), batch_size=50, seed=0),
        epochs=10,
        layout=ab.Layout(micro_batch=10),
        collate=data.collate,
    ):
        pass
    assert len({shape[1] for shape in visited}) > 3  # its own maximum each time
    examples = ab.evaluate(model, ab.Objective(cross_entropy), data, collate=data.collate)
    assert examples.metrics["accuracy"] > 0.9
    untrained = ab.evaluate(  # the control
        gru_classifier(2, 8, 2, embedding=4),
        ab.Objective(cross_entropy),
        data,
        collate=data.collate,
    )
    assert untrained.metrics["accuracy"] < 0.7


@pytest.mark.parametrize(
    ("sequences", "targets", "args", "message"),
    [
        (
            [[1, 2], [], [3], []],
            [0, 1, 2, 3],
            {},
            r"Number 1 of the sequences is empty \(2 in all\)",
        ),
        ([], [], {}, "The data set is empty"),
        ([[1, 2], [3]], [0], {}, "2 inputs and 1 targets"),
        (
            [[1.0], [2.0, np.nan, np.inf]],
            [0, 1],
            {},
            "Number 1 of the sequences is not finite at place 1.* there are 2",
        ),
        ([[1.0], [2.0]], [0, np.nan], {}, "targets hold nan in example 1"),
        ([[1.0], [2.0]], [0, 1], {"weights": [0, 0]}, "All weights are 0"),
        ([[1.0], [2.0]], [0, 1], {"weights": [1, -1]}, "The weight of example 1 is -1"),
        ([[1], [-2]], [0, 1], {"tokens": True}, "below 0. Token ids must"),
        ([[1.5]], [0], {"tokens": True}, "float64. Token ids must"),
        ([1, 2], [0, 1], {}, "sequences cannot become one array.* differ only in their length"),
        ([[[1, 2]], [[3]]], [0, 1], {}, "sequences cannot become one array"),
        ([["a"], ["b"]], [0, 1], {}, "inputs are <U1"),
        (([1, 2, 3], [0, 2, 4]), [0, 1], {}, "begin with 0 and end with 4. .* at most 3"),
        (([1, 2, 3], [0, 3, 2]), [0, 1], {}, "They must rise"),
        (([1, 2, 3], [-1, 3]), [0], {}, "begin with -1"),
        (([1, 2, 3], [0.0, 3.0]), [0], {}, r"offsets of sequences are float64 of shape \(2,\)"),
        (([1, 2, 3], [0, 0, 3]), [0, 1], {}, "Number 0 of the sequences is empty"),
    ],
)
def test_what_is_not_ragged_numbers_is_refused(
    sequences: Any, targets: Any, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Sequences.from_arrays(sequences, targets, **args)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, 2], [3, 4]], r"Sequence 1 has 1 values and 2 targets. Each value needs one"),
        ([[1, 2]], "2 sequences, and targets of 1. Pass targets of each"),
        ([[1.0, np.nan], [3.0]], "Number 0 of the targets is not finite at place 1"),
    ],
)
def test_targets_that_are_not_one_a_value_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Sequences.from_arrays([[1, 2], [3]], targets, target_each_value=True)


def test_a_value_too_large_for_the_dtype_is_refused() -> None:
    data = Sequences.from_arrays([[1.0, 1e300]], [0])
    with pytest.raises(DataError, match=r"values reach 1e\+300. torch.float32 cannot hold"):
        data.to(torch.float32)
    assert data.to(torch.float64).values[1] == 1e300
