"""Promise 2: SHA-256 of weights, buffers, optimiser and losses is one for any number of ranks.

Oracle: the same training in this process alone, without ranks; there is no tolerance. Controls that
must fail: at 4 ranks the plain all-reduce of each rank's own sum, and the same without `bitwise`.
Ranks are processes over gloo, groups of 1, 2, 3 and 4 of them, started once.
"""

import pickle
from functools import partial

import pytest
import torch

import anybatch as ab
import bitwise_training
from anybatch.errors import LayoutError
from anybatch.training.launch import launch
from bitwise_training import MATRIX, OPTIMIZERS, OTHERS, WORLDS, sharded, train


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the digest of each training, by rank."""
    work = partial(bitwise_training.work, tmp_path_factory.mktemp("bitwise"))
    return list(map(pickle.loads, launch(work, 4, imports=["bitwise_training"])))


@pytest.mark.parametrize("case", MATRIX, ids=", ".join)
def test_ranks_end_in_the_bits_of_one_process(results, case):
    digests = {one[case, world] for one in results for world in WORLDS if (case, world) in one}
    assert digests == {train(None, *case)}


@pytest.mark.parametrize("name", OTHERS)
def test_so_does_all_else_that_changes_an_update(results, name):
    digests = {one[name, world] for one in results for world in WORLDS if (name, world) in one}
    assert digests == {OTHERS[name](None)}


def test_a_plain_all_reduce_and_a_running_sum_end_in_others(results):
    """Controls, at 4 ranks."""
    alone = train(None, "MLP", "SGD", "one pass")
    for reduced, running in (one["controls"] for one in results):
        assert reduced != alone
        assert running != alone


def test_a_run_taken_up_by_other_ranks_ends_in_the_bits_of_one_that_was_not(results):
    state, losses = train(None, "GPT with dropout", "AdamW", "two passes")
    for one in results[:2]:
        ended, last = one["resumed", 2]
        assert (ended, last) == (state, losses[4:])
    assert [len(results[0]["resumed", world][1]) for world in (3, 4, 1, 2)] == [2, 1, 1, 2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_does_one_whose_state_lay_in_parts_on_3_and_4_of_them(results, optimizer, tmp_path):
    alone = sharded(None, tmp_path / "run", optimizer)
    assert {one["sharded", optimizer] for one in results} == {alone}
    assert sharded(None, tmp_path / "other", optimizer, stop=5) != alone  # the control


@pytest.mark.smoke
@pytest.mark.parametrize("layout", [None, ab.Layout(4), ab.Layout("auto"), ab.Layout([10, 8])])
def test_micro_batches_of_whole_grains_change_no_bit(layout):
    model, inputs = torch.nn.Linear(3, 2), torch.randn(18, 3)
    objective = ab.Objective(lambda m, batch: m(batch).square().sum(1), grain=2)
    ab.batch_gradient(model, objective, inputs, bitwise=True)
    expected = [p.grad.clone() for p in model.parameters()]
    ab.batch_gradient(model, objective, inputs, layout=layout, bitwise=True)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_micro_batch_that_cuts_a_grain_is_refused():
    model, inputs = torch.nn.Linear(3, 2), torch.randn(18, 3)
    objective = ab.Objective(lambda m, batch: m(batch).square().sum(1), grain=4)
    with pytest.raises(LayoutError, match="bitwise=True adds up grains in a fixed order, so the"):
        ab.batch_gradient(model, objective, inputs, layout=ab.Layout(3), bitwise=True)
