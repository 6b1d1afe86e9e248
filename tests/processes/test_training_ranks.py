"""Ranks that train together end as one process does, whatever their number and whenever it changes.

Four processes over gloo train as groups of 1, 2, 3 and 4; they are started once. Oracles: a loop in
plain torch (`training_by_hand`), and where grains, padding or evaluation come in, the same training
in this process alone, which knows of no ranks. Tolerance: 1e-12 in float64, for sums in another
order, on weights and all other state.
"""

import pickle
import re
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
import ranked_training
import training_by_hand as by_hand
from anybatch.distributed import RankError
from anybatch.layout import Layout, ShareRange, cut_grains
from anybatch.runs import checkpoints
from anybatch.runs.ledger_files import iterate_projections, read_ledger
from anybatch.training.batches import Share
from anybatch.training.launch import launch
from ranked_training import SCENARIOS, WORLDS
from small_training import rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def survivor(folder):
    """Return the message of rank 0 when rank 1 is killed, and the seconds until then."""
    with pytest.raises(RankError, match=r"rank 1 was killed by SIGKILL .* All 2 ranks"):
        launch(partial(ranked_training.die, folder), 2, imports=["ranked_training"])
    seconds, text = (folder / "survivor").read_text().split(maxsplit=1)
    return text, float(seconds)


@pytest.fixture(scope="module")
def results(folder, survivor):
    """Collect how each training ended, by rank."""
    return list(map(pickle.loads, launch(partial(ranked_training.work, folder), 4)))


@pytest.fixture(scope="module")
def alone(folder):
    """Train each in one process, without a group."""
    return {name: scenario(None) for name, scenario in SCENARIOS.items()}


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["plain", "a list"])
def test_ranks_end_in_the_weights_of_a_loop_in_plain_torch(results, name, world):
    expected = by_hand.by_hand(momentum)
    for rank in range(world):
        assert by_hand.distance(results[rank][name, world]["weights"], expected) < 1e-12


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - {"evaluated", "metrics"}))
def test_ranks_end_in_the_state_of_one_process(results, alone, name, world):
    for rank in range(world):
        result = results[rank][name, world]
        for key in result.keys() - {"read"}:
            mine, expected = torch.as_tensor(result[key]), torch.as_tensor(alone[name][key])
            assert by_hand.distance(mine.double(), expected.double()) < 1e-12, key
            assert torch.equal(mine, torch.as_tensor(results[0][name, world][key])), key


def test_another_order_of_examples_is_seen(alone):
    """Control: the tolerance tells apart what is not the same training."""
    other = ranked_training.plain(None, order=ab.Order(by_hand.N, batch_size=8, seed=5))
    assert by_hand.distance(other["weights"], alone["plain"]["weights"]) > 1e-3
    other = ranked_training.small(None, seed=8)
    assert by_hand.distance(other["state"], alone["small"]["state"]) > 1e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["plain", "fewer examples than ranks"])
def test_each_rank_reads_its_share_and_no_more(results, alone, name, world):
    shares = [results[rank][name, world]["read"] for rank in range(world)]
    assert sorted(chain.from_iterable(shares)) == sorted(alone[name]["read"])
    most = max(map(len, shares))
    assert most < 1.5 * len(alone[name]["read"]) / world + 1


@pytest.mark.parametrize("name", ["evaluated", "metrics"])
def test_evaluation_is_the_same_number_on_any_ranks(results, alone, name):
    if alone[name] is None:
        pytest.skip("torchmetrics is missing")
    for world in WORLDS:
        for rank in range(world):
            assert results[rank][name, world] == alone[name]


@pytest.mark.parametrize("left", [1, 2])
def test_a_run_is_taken_up_by_any_number_of_ranks(results, alone, left):
    ended = [one["resumed", left] for one in results if ("resumed", left) in one]
    for one in ended[: 3 - left]:  # those that made the last updates: 1, or 2
        assert by_hand.distance(one["state"], alone["small"]["state"]) < 1e-12


def test_checkpoints_and_records_do_not_know_how_many_ranks_there_were(results, folder):
    run = folder / "left-at-1"
    scan = checkpoints.find_newest(run / "checkpoints")
    assert scan.checkpoint.step == 9
    assert not re.search(
        "rank|world", str(scan.checkpoint.settings) + str(checkpoints.load(scan.checkpoint))
    )
    assert [row["step"] for row in rows(run)] == list(range(9))
    assert [row["ranks"] for row in rows(run, "session")] == [1, 4, 2]


def test_a_killed_rank_stops_the_others_at_once_and_three_go_on_where_two_were(
    results, alone, survivor, folder
):
    text, seconds = survivor
    assert text.startswith(
        "rank 1 is gone: killed, or its machine is out of reach. The collective failed with: "
    )
    assert seconds < 10
    assert [row["step"] for row in rows(folder / "killed", "session")] == [0, 4]
    for rank in range(3):
        result = results[rank]["killed"]
        assert by_hand.distance(result["state"], alone["small"]["state"]) < 1e-12
        expected = alone["small"]["losses"][4:]
        assert result["losses"] == pytest.approx(expected, rel=1e-12)


def test_the_ledger_of_a_run_holds_the_rows_of_all_shares_in_order(results, folder, tmp_path):
    ranked_training.observe_norms(None, tmp_path / "alone")
    result, expected = (read_ledger(run) for run in (folder / "observed", tmp_path / "alone"))
    assert result.keys() == expected.keys() >= {"example", "loss", "norm"}
    for name, column in expected.items():
        assert result[name] == pytest.approx(column, rel=1e-12), name
    files = (iterate_projections(run) for run in (folder / "observed", tmp_path / "alone"))
    for outcome, right in zip(*files, strict=True):
        assert outcome["projection"].shape == (len(outcome["step"]), 16)
        mine, alone = (columns["projection"] for columns in (outcome, right))
        size = np.linalg.norm(alone)
        assert np.linalg.norm(mine - alone) < 1e-6 * size  # float32 on the disk
        assert np.linalg.norm(np.roll(mine, 1, 0) - alone) > 0.1 * size  # the control


@pytest.mark.parametrize(
    ("mistake", "kind", "message", "rank"),
    [
        ("unread", "OSError", "the disk has a hole", 1),
        ("body", None, "a rank has left its loop and others have not", 1),
        ("break", None, "a rank has left its loop and others have not", 2),
        ("weights", "RunError", "rank 2 begins with weights.3.bias = '", None),
        (
            "rate",
            "RunError",
            "rank 1 begins with settings.optimizer.groups[0].lr = 0.2 and rank 0 with 0.1",
            None,
        ),
        ("optimizer", "MemoryError", "no room for momentum", 1),
        ("records", "RunError", "the disk is full", 0),
        ("checkpoint", "RunError", "the disk is full", 0),
        ("folder", "RunError", "exists and is no run", 0),
        ("group", "RunError", "the run is open for 1 ranks and steps() trains on 3", None),
    ],
)
def test_a_mistake_of_one_rank_stops_all_with_its_cause(results, mistake, kind, message, rank):
    for number in range(3):
        failed = results[number]["failures"][mistake]
        if kind is None and number == rank:  # it has left by itself
            assert mistake == "break" or failed[:2] == ("ZeroDivisionError", "in the body")
            continue
        found_kind, text, notes, seconds = failed
        assert found_kind == (kind or "RankError")
        assert message in text
        assert notes == ([] if rank is None else [f"raised on rank {rank}"])
        assert seconds < 10


def test_ranks_that_made_no_mistake_do_not_fail(results):
    assert [one["failures"]["none"] for one in results[:3]] == [None] * 3


@given(st.integers(1, 60), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_shares_are_runs_of_whole_grains_that_make_up_the_batch(num_examples, ranks, grain):
    cuts = [Share(rank=rank, num_ranks=ranks, grain=grain)(num_examples) for rank in range(ranks)]
    assert [i for cut in cuts for i in range(num_examples)[cut]] == list(range(num_examples))
    place = ShareRange(0, num_examples, num_examples)
    starts = [part.start for part in cut_grains(place, grain, Layout(), "")]  # the oracle of edges
    counts = [sum(cut.start <= start < cut.stop for start in starts) for cut in cuts]
    assert all(cut.start in [*starts, num_examples] for cut in cuts)
    assert max(counts) - min(counts) <= 1
