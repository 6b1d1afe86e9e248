"""Models in shards (`fully_shard`): the update of the whole model, and bit for bit where asked for.

Oracles: plain autograd on the unsplit batch, and the same training of a whole model in this process
alone. Control: each rank's grains one after the other and then the ranks, on 4 of them. Ranks are
processes over gloo, groups of 1, 2, 3 and 4 of them, started once.
"""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import fully_sharded_training
from anybatch.distributed import RankError
from anybatch.gradient.fsdp import ShardedAccumulator
from anybatch.gradient.survey import survey_model
from anybatch.runs import checkpoints
from anybatch.training.launch import launch
from cases import distance
from fully_sharded_training import CASES, MISTAKES, SHARES, WORLDS, train_case
from test_gradient_ranks import SCENARIOS, truth_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Collect the results of each training, by rank."""
    work = partial(fully_sharded_training.work, tmp_path_factory.mktemp("shards"))
    return list(map(pickle.loads, launch(work, 4, imports=["fully_sharded_training"])))


@pytest.mark.parametrize("world", SHARES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_has_its_slice_of_the_gradient_of_the_unsplit_batch(results, name, world):
    truth = truth_of(name)
    clipped = truth.gradient * min(1, 0.5 / truth.gradient.norm())
    result = [results[rank][name, world] for rank in range(world)]
    assert sum(one["slices"] for one in result) == len(truth.gradient)
    for one in result:
        assert distance(one["gradient"], clipped) < 1e-12
        assert one["norm"].item() == pytest.approx(truth.gradient.norm().item(), rel=1e-12)
        assert one["loss"].item() == pytest.approx(truth.loss.item(), rel=1e-12)
        for buffer, expected in truth.buffers.items():
            assert (one["buffers"][buffer] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_training_ends_in_the_bits_of_a_whole_model_in_one_process(results, case):
    """Weights, the optimiser's state, an average of the weights, losses, and an evaluation."""
    whole = train_case(None, case, shard=False)
    assert {results[0][case, world] for world in WORLDS} == {whole}
    assert {one[case, 4][1:] for one in results} == {whole[1:]}  # on every rank


def test_ranks_one_after_the_other_end_in_others(results):
    assert results[0]["control"][0] != train_case(None, CASES[0], shard=False)[0]  # the control


def test_a_run_is_taken_up_by_other_ranks_in_shards_or_not(results):
    digest, losses, evaluated = train_case(None, CASES[2], shard=False)
    assert results[0]["resumed"] == (digest, losses[5:], evaluated)


def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all(results):
    assert [one["overflown"] for one in results[:2]] == [False, False]


def test_draws_that_show_in_a_first_pass_are_found_where_a_rank_has_no_example(results):
    truth = fully_sharded_training.drawing(None)
    for one in results[:3]:
        assert distance(one["drawing"], truth) < 1e-12


def test_a_backward_pass_of_ones_own_is_as_before_an_update(results):
    for one in results[:2]:
        after, without = one["own backward"]
        assert torch.equal(after, without)
        assert without.abs().sum() > 0


WORDS = {
    "no group": ("ModelError", "sharded (fully_shard), and group is None"),
    "other ranks": ("ModelError", "0.weight is not in slices over the 2 ranks of the group"),
    "a layer alone": ("ModelError", "1.weight is not in slices over the 2 ranks"),
    "narrow": (
        "ModelError",
        "weight is torch.bfloat16. A sharded parameter must be at least float32",
    ),
    "observed": ("LedgerError", "so no rank sees a whole gradient of an example"),
    "each clipped": ("LedgerError", "observe= and ClipExamples need one"),
    "auto": ("LayoutError", "Pass a number of examples"),
    "in some passes": (
        "ModelError",
        "or in some passes only. With bitwise=True it must leave one in each",
    ),
    "both": ("ModelError", "Leave shard out"),
    "no parts": ("ModelError", "ByNorm updates a slice of a parameter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_is_refused_on_every_rank(results, name):
    kind, words = WORDS[name]
    for one in results[:2]:
        assert one[name] is not None
        assert (one[name][0], words in one[name][1]) == (kind, True), one[name]


def test_an_error_in_the_midst_of_the_layers_stops_the_others_and_is_named():
    with pytest.raises(RankError, match=r"rank 1 has ended .* by ValueError: no such word"):
        launch(fully_sharded_training.raising, 2, imports=["fully_sharded_training"])


def test_the_example_leaves_the_same_digest_on_1_and_3_ranks(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "fully_sharded.py"
    result = []
    for ranks in (1, 3):
        run = tmp_path / str(ranks)
        torchrun = (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}")
        train_case = subprocess.run([*torchrun, "--standalone", example, run], capture_output=True)
        assert train_case.returncode == 0, train_case.stderr.decode()
        result.append(checkpoints.find_newest(run / "checkpoints").checkpoint)
        num_bytes = int(train_case.stdout.split()[-8].replace(b",", b""))
        assert num_bytes < 27_008 / ranks * 1.1
    assert result[0].digest == result[1].digest
    assert result[0].step == result[1].step == 40


def test_with_one_grain_a_rank_nothing_is_kept_and_with_more_the_nodes_of_all():
    rows = torch.tensor([[1e8], [1.0], [-1e8], [3.0]])
    bare = survey_model(torch.nn.Linear(1, 1))
    one = ShardedAccumulator(bare, [1, 1, 1, 1], [(0, 1), (1, 2), (2, 3), (3, 4)], None)
    assert one.combine(0, rows.clone()).item() == ((rows[0] + rows[1]) + (rows[2] + rows[3])).item()
    assert one._nodes == {}
    two = ShardedAccumulator(bare, [2, 2], [(0, 2), (2, 4)], None)
    two.combine(0, rows[[0, 2]])
    assert len(two._nodes[0]) == 2
    two.add(None)
    assert two.combine(0, rows[[1, 3]]).item() == ((rows[0] + rows[1]) + (rows[2] + rows[3])).item()
    assert two._nodes == {}
