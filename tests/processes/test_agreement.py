"""Ranks that part are stopped at the next comparison: by the tensor, the update and the rank.

Faults are made in four processes over gloo, started once. Controls: the same training without the
fault goes through, and with the fault and no comparison too.
"""

import pickle
import re
from datetime import timedelta
from functools import partial

import pytest
import torch

import parted_training
from anybatch.runs import checkpoints
from anybatch.training.launch import launch

RANKS = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parted")


@pytest.fixture(scope="module")
def results(folder):
    """Collect how each training ended, by rank."""
    work = partial(parted_training.work, folder)
    patience = timedelta(seconds=60)  # none is waited for in vain
    ended = launch(work, 4, imports=["parted_training"], patience=patience)
    return list(map(pickle.loads, ended))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "weight",
            r"after 4 updates the ranks have diverged at model.3.weight, the first of 1: most, "
            r"ranks 0, 1 and 3 have (\w{12}), and rank 2 has (?!\1)\w{12}\. All had the same "
            r"bits after 3. .* probably a hardware fault.* random numbers without a key. "
            r"Nothing has been checkpointed yet",
        ),
        ("moment", r"diverged at optimizer.state.0.bias.exp_avg_sq, the .* and rank 2 has"),
        ("user", r"diverged at user.counter.seen, the first of 1: .* and rank 2 has"),
        (
            "two of four",
            r"diverged at model.3.weight, the first of 1: ranks 0 and 3 have \w+ and ranks 1 and 2 "
            r"have \w+, none of them most",
        ),
        (
            "noise",
            r"diverged at model.0.weight, the .*: rank 0 has \w+ and rank 1 has \w+ and rank 2 has "
            r"\w+ and rank 3 has \w+, none of them most",
        ),
        (
            "checkpoint",
            r"after 4 updates .* optimizer.state.0.bias.exp_avg_sq, .* bits after 2. .* Nothing "
            r"has been checkpointed since 2 updates: mend the cause, and resume from there",
        ),
        ("count", "compare_every is 0. It must be a number of updates of at least 1"),
    ],
)
def test_what_has_parted_is_named_on_every_rank(results, name, message):
    texts = set()
    for rank in RANKS:
        (kind, text, _), seconds = results[rank][name]
        assert kind == "RunError"
        assert re.search(message, text), text
        assert seconds < 10
        texts.add(text)
    assert len(texts) == 1


def test_between_two_comparisons_a_fault_stays_in_its_tensor(results):
    """Gradients are sums over all ranks, so they are the same on each."""
    for rank in (1, 2):
        (_, text, _), _ = results[rank]["pair"]
        assert "after 6 updates" in text
        assert "same bits after 3" in text
        named = (
            r"at model.3.weight, the first of 1: rank 0 has \w+ and rank 1 has \w+, none of them"
        )
        assert re.search(named, text)


def test_what_has_parted_is_not_checkpointed(results, folder):
    assert results[0]["checkpoint"][0][0] == "RunError"
    assert checkpoints.find_newest(folder / "checkpoint" / "checkpoints").checkpoint.step == 2


def test_ranks_that_agree_and_ranks_that_are_not_compared_go_on(results, folder):
    """Controls."""
    alone = parted_training.train_parted(None, parted_training.nothing, (), compare_every=1)
    for rank in RANKS:
        result, _ = results[rank]["none"]
        assert result == pytest.approx(alone, rel=1e-12)
        assert len(results[rank]["not compared"][0]) == 12
    assert checkpoints.find_newest(folder / "none" / "checkpoints").checkpoint.step == 12


@pytest.mark.parametrize(
    ("name", "rank", "kind", "message"),
    [
        ("saved by one", 0, "RunError", "step.save() was called on some ranks and not on others"),
        ("failed", 1, "ZeroDivisionError", "in the body"),
    ],
)
def test_a_save_by_some_and_a_failure_of_one_while_others_save_stop_all(
    results, name, rank, kind, message
):
    for number in RANKS:
        (result, text, _), seconds = results[number][name]
        assert (result == kind) == (number == rank)
        assert text.startswith(message if number == rank else "a rank has left its loop")
        assert seconds < 10


def test_bitwise_ranks_of_another_environment_are_refused_by_the_rank(results):
    threads = max(1, torch.get_num_threads() // 4)
    for rank in RANKS:
        (kind, text, _), _ = results[rank]["threads"]
        assert kind == "RunError"
        assert text.startswith(
            f"rank 2 begins with settings.environment.threads = {threads + 1} and rank 0 with "
            f"{threads}. With bitwise=True all must compute the same bits."
        )


def test_an_operation_without_a_kernel_that_repeats_its_bits_is_refused_on_all(results):
    for rank in RANKS:
        (kind, text, _), _ = results[rank]["no kernel"]
        assert kind == "ModelError"
        assert "the operation max_unpooling2d_forward_out has no kernel that repeats" in text
