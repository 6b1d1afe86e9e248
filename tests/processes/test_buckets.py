"""Buckets sent while the last backward pass runs: the same bits, and no rank waits for ever.

Oracle: the same update in one process, which sends nothing; there is no tolerance. Controls: that
buckets were sent early at all; and a gradient that comes in portions, where nobody looks for it.
"""

import pickle
import re
from datetime import timedelta
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bucketed_updates
from anybatch.distributed import RankError
from anybatch.gradient import buckets
from anybatch.training.launch import launch
from bucketed_updates import (
    CULPRIT,
    FAILS,
    MARKED,
    RUNS,
    SHARES,
    WORKS,
    Model,
    height,
    plainly,
    update,
)
from properties import seeded_examples

WORLDS = tuple(SHARES)
PARAMETERS = 7


@pytest.fixture(scope="module")
def results():
    """Return the outcome of each update, by rank."""
    patience = timedelta(minutes=2)  # a rank that waits for ever is a failure
    work = partial(bucketed_updates.work)
    result = launch(work, 4, imports=["bucketed_updates"], patience=patience)
    return list(map(pickle.loads, result))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", WORKS)
def test_ranks_end_in_the_bits_of_one_process(results, name, world):
    alone = WORKS[name][1](world)
    for rank in range(world):
        result, _, num_sent = results[rank][name, world]
        assert result == alone
        assert num_sent == PARAMETERS


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("shares", PARAMETERS),
        ("two passes", PARAMETERS),
        ("auto", PARAMETERS),
        ("observed", 0),  # the ledger delivers gradients itself
        ("grain norms", 0),  # which need the gradient as it is left
    ],
)
def test_buckets_are_sent_in_the_backward_pass(results, name, early, world):
    """Check that buckets were sent early at all: the other tests rest on it."""
    for rank in range(world):
        assert results[rank][name, world][1] == (early if SHARES[world][rank] else 0)


@pytest.mark.parametrize("world", WORLDS)
def test_they_are_sent_afterwards_where_there_is_no_such_pass(results, world):
    for rank in range(world):
        has_share = bucketed_updates.EMPTY[world][rank] > 0
        assert results[rank]["empty shares", world][1] == PARAMETERS * has_share
        is_culprit = rank == CULPRIT[world]
        has_share = SHARES[world][rank] > 0 and not is_culprit
        assert results[rank]["last part skipped", world][1] == PARAMETERS * has_share
        assert results[rank]["one rank sends late", world][1] == (
            PARAMETERS if rank and SHARES[world][rank] else 0
        )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("on the way back", "OutOfLuck", "on the way back"),
        ("on the way back, two passes", "OutOfLuck", "on the way back"),
        ("draws torch", "ModelError", "Pass key="),
        ("draws NumPy", "ModelError", "Pass key="),
        ("out of memory", "LayoutError", "one grain does not fit in memory"),
        ("sparse", "ModelError", "gradient of rows.weight is sparse"),
    ],
)
def test_an_error_in_the_last_backward_pass_is_one_on_all_ranks(
    results, name, kind, message, world
):
    for rank in range(world):
        (result, text, notes), after = results[rank][name, world]
        assert (result, message in text) == (kind, True), text
        if kind == "OutOfLuck":
            assert notes == [f"raised on rank {CULPRIT[world]}"]
        assert after == update(None)  # and nothing is left of it


def test_every_failure_is_looked_at():
    (names,) = [
        mark.args[1]
        for mark in test_an_error_in_the_last_backward_pass_is_one_on_all_ranks.pytestmark
        if mark.args[0] != "world"
    ]
    assert {name for name, *_ in names} == set(FAILS)


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_that_comes_in_portions_is_found_and_remembered(results, world):
    alone = update(None, Model(again=plainly), marked=MARKED[world])
    for rank in range(world):
        (first, second), unseen = results[rank]["in portions", world]
        assert first[0] == second[0] == alone
        num_grains = SHARES[world][rank] // 2
        assert [first[1], second[1]] == [2 * num_grains, 3 * num_grains]
        assert unseen != alone  # the control


@pytest.mark.parametrize("runs", RUNS)
def test_no_more_memory_than_the_nodes_and_one_more_gradient(results, runs):
    """Beside a bucket of each node, which is copied on its way: an eighth of the gradient."""
    alone = height(None, runs)  # the nodes, and what the last grain leaves
    for rank in range(2):
        assert results[rank]["height"][RUNS.index(runs)] < alone + 1 + 3 / 8
    at_once = results[0]["height of all at once"][1]
    assert at_once > height(None, RUNS[1]) + 2  # the control


@seeded_examples(50)
@given(st.lists(st.integers(1, 4000), max_size=8), st.integers(1, 8000))
def test_buckets_hold_every_tensor_once_from_the_last_on(sizes, most):
    kinds = torch.float32, torch.float64
    like = [torch.empty(size, dtype=kinds[size % 2]) for size in sizes]
    result = buckets.cut_buckets(like, most)
    assert [i for bucket in result for i in bucket] == list(range(len(sizes)))[::-1]
    for bucket in result:
        assert len({like[i].dtype for i in bucket}) == 1
        assert len(bucket) == 1 or sum(like[i].nbytes for i in bucket) <= most


def test_a_rank_that_hangs_in_the_last_backward_pass_is_named(tmp_path):
    work = partial(bucketed_updates.hang, tmp_path)
    missed = r"rank 1 has not come to the others, which waited \d s: it was at .*sleep_for_ever"
    with pytest.raises(RankError, match=missed):
        launch(work, 2, imports=["bucketed_updates"], patience=timedelta(seconds=5))
    assert re.match(missed, (tmp_path / "0").read_text())
