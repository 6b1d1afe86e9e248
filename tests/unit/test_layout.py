"""Layouts against brute force: every example placed by itself, one after the other."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import LayoutError
from anybatch.layout import Layout, MicroBatch, ShareRange, cut_grains, cut_micro_batches
from properties import seeded_examples

seeded = seeded_examples(100)

WHY = "the Dropout '1' draws random numbers"


def ranges(parts):
    return [list(range(part.start, part.stop)) for part in parts]


def consecutive(labels):
    """Examples with the same label, together: [0, 0, 1] -> [[0, 1], [2]]."""
    return [[i for i, x in enumerate(labels) if x == label] for label in sorted(set(labels))]


def whole(size):
    return ShareRange(0, size, size)


# ------------------------------------------------------------------------------- micro-batches


@seeded
@given(size=st.integers(0, 40), micro_batch=st.integers(1, 50))
def test_a_micro_batch_is_so_many_examples_and_the_last_one_what_is_left(size, micro_batch):
    parts = cut_micro_batches(Layout(micro_batch=micro_batch), size)
    assert ranges(parts) == consecutive([i // micro_batch for i in range(size)])
    assert all(part.grain is None for part in parts)


@pytest.mark.parametrize("size", [1, 7])
def test_without_a_size_the_share_is_one_micro_batch(size):
    assert cut_micro_batches(Layout(), size) == [MicroBatch(0, size)]


@seeded
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_explicit_sizes_cut_in_their_order(sizes):
    labels = [cut for cut, n in enumerate(sizes) for _ in range(n)]
    assert ranges(cut_micro_batches(Layout(micro_batch=sizes), len(labels))) == consecutive(labels)


@pytest.mark.parametrize("layout", [Layout(), Layout(3), Layout([2, 3])])
def test_an_empty_share_has_no_parts(layout):
    assert cut_micro_batches(layout, 0) == []


@pytest.mark.parametrize(("sizes", "size"), [([3, 3], 8), ([3, 3], 5), ([9], 8)])
def test_explicit_sizes_that_do_not_add_up_to_the_share_are_refused(sizes, size):
    message = rf"hold {sum(sizes)} examples, but the share holds {size}"
    with pytest.raises(LayoutError, match=message):
        cut_micro_batches(Layout(micro_batch=sizes), size)


def test_numbers_of_numpy_are_numbers_and_sequences_become_tuples():
    assert Layout(np.int64(3)) == Layout(3)
    assert Layout([np.int32(3), 2]) == Layout((3, 2))
    assert type(Layout(np.int64(3)).micro_batch) is int
    assert hash(Layout([3, 2])) == hash(Layout((3, 2)))
    assert Layout("auto").micro_batch == "auto"


@pytest.mark.parametrize(
    "micro_batch",
    [0, -1, 2.0, True, False, "4", "all", "", [], (), [3, 0], [3, 1.0], [True], ["3"], [[3]]],
    ids=repr,
)
def test_a_micro_batch_that_is_no_number_of_examples_is_refused(micro_batch):
    with pytest.raises(LayoutError, match="It must be None, 'auto', a number of examples"):
        Layout(micro_batch=micro_batch)


@pytest.mark.parametrize("micro_batch", [np.array([3, 2]), np.float64(3.0), np.True_], ids=repr)
def test_what_of_numpy_is_no_number_of_examples_is_refused(micro_batch):
    with pytest.raises(LayoutError, match="It must be None, 'auto', a number of examples"):
        Layout(micro_batch=micro_batch)


# -------------------------------------------------------------------------------------- grains


def grains_by_hand(total, grain):
    """Label each example; a last one alone, left by larger grains, takes its neighbour's label."""
    labels = [i // grain for i in range(total)]
    if grain > 1 and labels.count(labels[-1]) < 2 and labels[-1] > 0:
        labels[-1] -= 1
    return consecutive(labels)


@seeded
@given(total=st.integers(1, 60), grain=st.integers(1, 70))
def test_a_batch_is_cut_into_grains_and_a_last_one_under_2_joins_its_neighbour(total, grain):
    parts = cut_grains(whole(total), grain, Layout(), WHY)
    assert ranges(parts) == grains_by_hand(total, grain)
    assert [part.grain for part in parts] == list(range(len(parts)))


@pytest.mark.parametrize(("total", "sizes"), [(64, [32, 32]), (65, [32, 33]), (66, [32, 32, 2])])
def test_one_example_left_over_makes_the_last_grain_larger_and_two_make_one_of_their_own(
    total, sizes
):
    assert [len(r) for r in ranges(cut_grains(whole(total), 32, Layout(), WHY))] == sizes


@pytest.mark.parametrize("total", [1, 2, 33])
def test_without_a_grain_the_whole_batch_is_one(total):
    assert cut_grains(whole(total), None, Layout(), WHY) == [MicroBatch(0, total, 0)]


@seeded
@given(
    total=st.integers(2, 60),
    grain=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 99), max_size=3),
)
def test_shares_of_whole_grains_hold_together_the_grains_of_the_batch(total, grain, cuts):
    expected = grains_by_hand(total, grain)
    edges = [0, *(run[-1] + 1 for run in expected)]
    bounds = [0, *sorted(edges[cut % len(edges)] for cut in cuts), total]
    together = []
    for start, stop in pairwise(bounds):
        for part in cut_grains(ShareRange(start, stop, total), grain, Layout(), WHY):
            together.append((part.grain, list(range(start + part.start, start + part.stop))))
    assert together == list(enumerate(expected))  # empty shares add nothing


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            ShareRange(3, 8, 16),
            "share starts at example 3 of 16, inside a grain. Make shares and micro",
        ),
        (ShareRange(0, 9, 16), "share ends at example 9 of 16, inside a grain"),
        (ShareRange(0, 16, 17), "share ends at example 16 of 17, inside a grain"),  # 8 and 9
    ],
)
def test_a_share_that_cuts_a_grain_is_refused(place, message):
    with pytest.raises(LayoutError, match=f"^{WHY}, so the model runs in grains of 8.*{message}"):
        cut_grains(place, 8, Layout(), WHY)


def test_a_share_of_a_batch_without_grains_is_told_to_declare_one():
    with pytest.raises(LayoutError, match=r"ends at example 8 of 16.*Objective\(grain=\.\.\.\)"):
        cut_grains(ShareRange(0, 8, 16), None, Layout(), WHY)


@pytest.mark.parametrize("micro_batch", [8, 12, 16, 17, 99, [8, 9], [8, 8, 1], None])
def test_micro_batches_no_smaller_than_a_grain_run_grain_by_grain(micro_batch):
    parts = cut_grains(whole(17), 8, Layout(micro_batch=micro_batch), WHY)
    assert parts == [MicroBatch(0, 8, 0), MicroBatch(8, 17, 1)]


@pytest.mark.parametrize(("micro_batch", "smallest"), [(7, 7), ([8, 4, 5], 4), (1, 1)])
def test_a_micro_batch_smaller_than_a_grain_is_refused(micro_batch, smallest):
    with pytest.raises(LayoutError, match=f"But a micro-batch holds {smallest}. Make shares"):
        cut_grains(whole(17), 8, Layout(micro_batch=micro_batch), WHY)


def test_a_share_range_knows_its_size():
    assert ShareRange(2, 5, 8).size == MicroBatch(2, 5).size == 3
