"""Interrupted and continued training ends in the same bits as training that never stopped.

The oracle is the training itself without a run: nothing of it saves or restores anything. States
are compared bit by bit by `nested_states.same`, so there is no tolerance.
"""

import logging
from dataclasses import replace

import pytest
import torch

import anybatch as ab
from anybatch.errors import CheckpointError, DivergenceError, RunError
from anybatch.runs import checkpoints
from anybatch.runs.records import read_records
from anybatch.runs.state import TrainingState
from anybatch.training.loop import _Loop
from nested_states import same
from small_training import EPOCHS, data, start, train_small

UPDATES = {"keep": 9, "carry": 7, "drop": 6}


def steps_of(folder):
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("checkpoints/*"))]


def newest(folder):
    return checkpoints.find_newest(folder / "checkpoints").checkpoint


def left_after(run, num_updates, **options):
    """Start training and break out of its loop after so many updates, saving the last."""
    for step in start().loop(run, **options):
        if step.step + 1 == num_updates:
            step.save()
            break


def test_the_small_training_repeats_its_bits_and_another_seed_does_not():
    assert same(train_small().state, train_small().state)
    assert not same(train_small().state, train_small(seed=8).state)


@pytest.mark.parametrize("last", UPDATES)
def test_a_run_left_at_any_step_ends_as_if_never_left(tmp_path, last):
    expected = train_small(last=last)
    assert len(expected.losses) == UPDATES[last]
    for stop in range(1, UPDATES[last] + 1):
        left_after(tmp_path / str(stop), stop, last=last)
        resumed = train_small(tmp_path / str(stop), last=last)
        assert resumed.losses == expected.losses[stop:]
        if stop < UPDATES[last]:
            assert same(resumed.state, expected.state), stop


def test_a_run_left_at_every_step_ends_as_if_never_left(tmp_path):
    expected = train_small()
    for stop in range(1, UPDATES["keep"]):
        left_after(tmp_path, stop)
    assert same(train_small(tmp_path).state, expected.state)


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 1, 2])
def test_an_exception_in_the_body_goes_back_to_the_last_checkpoint(tmp_path, every):
    expected = train_small()
    for stop in range(UPDATES["keep"]):
        folder = tmp_path / str(stop)
        with pytest.raises(ZeroDivisionError, match="division"):
            train_small(
                ab.Run(folder, checkpoint_every=every),
                lambda _, step, stop=stop: 1 / (step.step - stop),
            )
        saved = stop // (every or 3) * (every or 3)
        assert steps_of(folder)[-1:] == [saved][: saved > 0]
        resumed = train_small(folder)
        assert resumed.losses == expected.losses[saved:]
        assert same(resumed.state, expected.state)


def _forgets_the_optimizer(self, state):
    self.model.load_state_dict(state["model"])
    self.reduction = dict(state["reduction"])
    self.user["average"].load_state_dict(state["user"]["average"])


def _forgets_the_reduction(self, state):
    _restore(self, state)
    self.reduction = {}


def _forgets_the_buffers(self, state):
    before = [b.clone() for b in self.model.buffers()]
    _restore(self, state)
    for buffer, old in zip(self.model.buffers(), before, strict=True):
        buffer.copy_(old)


def _forgets_the_user(self, state):
    before = self.user["average"].state_dict()
    _restore(self, state)
    self.user["average"].load_state_dict(before)


_restore, _gradient = TrainingState.restore, _Loop.compute_gradient


@pytest.mark.parametrize(
    "forgetful",
    [_forgets_the_optimizer, _forgets_the_reduction, _forgets_the_buffers, _forgets_the_user],
)
def test_a_resume_that_forgets_a_part_of_the_state_is_seen(tmp_path, monkeypatch, forgetful):
    """Control: the comparison above sees each part of a checkpoint."""
    left_after(tmp_path, 5)
    monkeypatch.setattr(TrainingState, "restore", forgetful)
    assert not same(train_small(tmp_path).state, train_small().state)


def test_a_resume_that_counts_its_random_keys_from_zero_is_seen(tmp_path, monkeypatch):
    """Control: dropout is part of what is compared."""

    def from_zero(self, batch, *rest):
        return _gradient(self, replace(batch, key=ab.Key(7, batch.step - 5)), *rest)

    left_after(tmp_path, 5)
    monkeypatch.setattr(_Loop, "compute_gradient", from_zero)
    assert not same(train_small(tmp_path).state, train_small().state)


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [
        (None, "keep", [3, 6, 9]),
        (None, "drop", [2, 4, 6]),
        (None, "carry", [3, 6, 7]),  # epochs begin at examples 21 and 42: in steps 2 and 5
        (2, "keep", [2, 4, 6, 8, 9]),
        (9, "keep", [9]),
        (100, "keep", [9]),
    ],
)
def test_checkpoints_come_at_each_epochs_end_or_as_often_as_asked_and_last(
    tmp_path, every, last, expected
):
    train_small(ab.Run(tmp_path, checkpoint_every=every, keep=10), last=last)
    assert steps_of(tmp_path) == expected


def test_a_step_is_checkpointed_once_the_body_has_finished_with_it(tmp_path):
    def body(training, step):
        assert steps_of(tmp_path)[-1:] == [step.step][: step.step]  # not this one yet
        training.average.updates += 100

    train_small(ab.Run(tmp_path, checkpoint_every=1), body)
    assert checkpoints.load(newest(tmp_path))["user"]["average"]["updates"] == 9 * 101


def test_a_step_saved_before_the_body_has_finished_is_refused_where_it_differs(tmp_path):
    def early(training, step):
        step.save()
        training.average.updates += 100

    def late(training, step):
        training.average.updates += 100
        step.save()

    with pytest.raises(CheckpointError, match="Save a step once the body of the loop has changed"):
        train_small(ab.Run(tmp_path / "early", checkpoint_every=2), early)
    train_small(ab.Run(tmp_path / "late", checkpoint_every=2), late)  # and once more when due


def test_the_newest_are_kept(tmp_path):
    train_small(ab.Run(tmp_path / "two", checkpoint_every=1))
    train_small(ab.Run(tmp_path / "three", checkpoint_every=1, keep=3))
    assert steps_of(tmp_path / "two") == [8, 9]
    assert steps_of(tmp_path / "three") == [7, 8, 9]


@pytest.mark.parametrize("last", UPDATES)
def test_more_epochs_train_on_as_one_long_run(tmp_path, last):
    expected = train_small(last=last, epochs=5)
    train_small(tmp_path, last=last, epochs=2)
    assert same(train_small(tmp_path, last=last, epochs=5).state, expected.state)


def test_a_run_that_has_made_its_epochs_or_more_makes_no_update_and_gives_its_weights(tmp_path):
    expected = train_small(tmp_path)
    for epochs in (EPOCHS, 1):
        again = train_small(tmp_path, epochs=epochs)
        assert again.losses == []
        assert same(again.state["model"], expected.state["model"])
    assert steps_of(tmp_path) == [6, 9]


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_taken(tmp_path, caplog):
    expected = train_small()
    left_after(ab.Run(tmp_path, checkpoint_every=2), 5)
    (tmp_path / "checkpoints" / "step-000000000005" / "model.pt").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        resumed = train_small(tmp_path)
    assert resumed.losses == expected.losses[4:]
    assert same(resumed.state, expected.state)
    assert "step-000000000004 is the newest that verifies" in caplog.text
    row = read_records(tmp_path / "records.jsonl")[5]
    assert (row["kind"], row["step"]) == ("session", 4)
    assert "step-000000000005/model.pt: truncated" in row["refused"][0]


def test_nothing_is_overwritten_where_no_checkpoint_verifies(tmp_path):
    left_after(ab.Run(tmp_path, checkpoint_every=2), 5)
    for path in tmp_path.glob("checkpoints/*/model.pt"):
        path.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):  # the error leaves no lock behind
        with pytest.raises(CheckpointError, match="no checkpoint verifies"):
            train_small(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_model_that_does_not_fit_its_checkpoint_says_so():
    training = start()
    state = TrainingState(training.model, training.optimizer).dump()
    other = torch.nn.Linear(6, 3)
    with pytest.raises(RunError, match="does not fit this model and optimiser"):
        TrainingState(other, torch.optim.SGD(other.parameters())).restore(state)
    with pytest.raises(
        RunError, match=r"holds the user's \[\], and the state here is \['average'\]"
    ):
        TrainingState(
            training.model, training.optimizer, user={"average": training.average}
        ).restore(state)


def test_an_object_that_cannot_be_saved_is_refused_at_once():
    training = start()
    with pytest.raises(RunError, match=r"state\['rate'\] is a float, which cannot be restored in"):
        TrainingState(training.model, training.optimizer, user={"rate": 0.1})


def test_a_loss_that_is_not_finite_changes_nothing_and_the_run_can_go_on(tmp_path):
    left_after(tmp_path, 4)
    training, before = start(), newest(tmp_path)
    inputs, *rest = data()
    bad = int(ab.Order(21, batch_size=8, seed=7).indices(4)[-1])
    inputs[bad] = torch.nan  # batch normalisation carries it through its grain, the last four
    with pytest.raises(DivergenceError, match=rf"Not finite for 4 of 8 examples, .* {bad}\. Look"):
        list(training.loop(ab.Run(tmp_path, accept_data=True), data=(inputs, *rest)))
    assert newest(tmp_path) == before
    saved = checkpoints.load(before)
    assert same(training.state["model"], saved["model"])
    assert same(training.state["optimizer"], saved["optimizer"])
    assert training.losses == []
    assert same(train_small(tmp_path).state, train_small().state)


@torch.no_grad()
def overflow(training, step):
    if step.step == 5:
        training.model[0].weight.fill_(torch.inf)


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['model'\]\['0.weight'\] holds 48 infinite"):
        train_small(tmp_path, overflow)
    assert steps_of(tmp_path) == [3]
    assert same(train_small(tmp_path).state, train_small().state)


def test_a_buffer_may_be_infinite(tmp_path):
    training = start()
    training.model[0].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    list(training.loop(tmp_path))
    assert checkpoints.load(newest(tmp_path))["model"]["0.mask"].tolist() == [0.0, -torch.inf]
