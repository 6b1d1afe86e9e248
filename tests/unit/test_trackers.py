"""Trackers get the numbers of the records, each once, and can neither stop nor change a run."""

import logging
import math
import sys

import pytest

import anybatch as ab
from anybatch.errors import RunError
from anybatch.runs.trackers import Tracker, tracker_named
from anybatch.runs.trackers.protocol import list_numbers
from nested_states import same
from small_training import rows, start, train_small

NAMES = ("mlflow", "tensorboard", "wandb")


class NoteTracker:
    """Keeps what it is told, and takes back what is made again; fails when asked to."""

    def __init__(self, failing=None):
        self.failing, self.calls, self.shown = failing, [], []

    def begin(self, folder, step, settings):
        self.shown = [(t, values) for t, values in self.shown if t < step]
        self.note("begin", folder, step, settings)

    def log(self, step, values):
        self.shown.append((step, values))
        self.note("log", step)

    def flush(self):
        self.note("flush")

    def close(self):
        self.note("close")

    def note(self, *call):
        self.calls.append(call)
        if call[0] == self.failing:
            raise OSError("the disk is full")


def train_tracked(folder, *trackers, stop=None, training=None, **options):
    """Train with trackers and a note a step; leave after `stop` updates without saving."""
    training = training or start()
    run = ab.Run(folder, trackers=trackers, **options)
    for step in training.loop(run):
        run.record({"kind": "note", "step": step.step, "halved": step.loss / 2})
        if step.step + 1 == stop:
            break
    return training


def timeless(log):
    """Return what a tracker shows, without seconds."""
    return [(t, {k: v for k, v in values.items() if k != "seconds"}) for t, values in log.shown]


def test_the_numbers_of_a_row_have_the_names_of_their_places():
    step = {
        "kind": "step", "step": 7, "epoch": 1, "loss": 0.5, "parts": {"data": 0.4, "L2": 0.1},
        "metrics": {"accuracy": 1, "odd": None, "nan": math.nan, "inf": math.inf},
        "ids": [1, 2], "name": "x", "flag": True,
    }  # fmt: skip
    assert list_numbers(step) == {
        "epoch": 1.0, "loss": 0.5, "parts/data": 0.4, "parts/L2": 0.1, "metrics/accuracy": 1.0
    }  # fmt: skip
    evaluation = {"kind": "evaluation", "step": 7, "split": "held_out", "loss": 0.25}
    assert list_numbers(evaluation) == {"held_out/loss": 0.25}
    assert list_numbers({"kind": "note", "step": 7, "best": {"epoch": 3}}) == {
        "note/best/epoch": 3.0
    }
    assert list_numbers({"kind": "session", "step": 7, "threads": 2}) == {}


def test_a_tracker_gets_every_row_and_is_told_of_checkpoints_and_the_end(tmp_path):
    log = NoteTracker()
    train_tracked(tmp_path, log, checkpoint_every=4, settings={"mine": 1})
    assert timeless(log) == [(row["step"], list_numbers(row)) for row in rows(tmp_path)]
    assert set(log.shown[0][1]) >= {
        "loss",
        "parts/data",
        "averages/data",
        "metrics/accuracy",
    }
    ((_, folder, step, settings),) = [call for call in log.calls if call[0] == "begin"]
    assert (folder, step, settings["mine"]) == (tmp_path, 0, 1)
    trace = "".join(call[0][0] for call in log.calls)
    assert trace == "b" + 8 * "l" + "f" + 8 * "l" + "f" + 2 * "l" + "f" + "c"  # two rows a step


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, None])
def test_after_stops_a_tracker_shows_what_it_shows_of_a_run_without(tmp_path, every):
    whole, cut = NoteTracker(), NoteTracker()
    train_tracked(tmp_path / "whole", whole)
    for stop in range(1, 9):
        train_tracked(tmp_path / "cut", cut, stop=stop, checkpoint_every=every)
    train_tracked(tmp_path / "cut", cut)
    assert timeless(cut) == timeless(whole)
    assert len(whole.shown) == 18


def test_a_tracker_that_takes_nothing_back_would_show_steps_twice(tmp_path):
    """Control: of the test above."""
    whole, cut = NoteTracker(), NoteTracker()
    train_tracked(tmp_path / "whole", whole)
    train_tracked(tmp_path / "cut", cut, stop=5)
    again = NoteTracker()
    train_tracked(tmp_path / "cut", again)
    again.shown = cut.shown + again.shown
    assert timeless(again) != timeless(whole)


def test_a_session_without_an_update_leaves_trackers_alone(tmp_path):
    train_small(tmp_path)
    log = NoteTracker()
    train_tracked(tmp_path, log)
    assert log.calls == []


@pytest.mark.parametrize("method", ["begin", "log", "flush", "close"])
def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_run_goes_on(
    tmp_path, method, caplog
):
    failing, other = NoteTracker(failing=method), NoteTracker()
    with caplog.at_level(logging.WARNING, "anybatch"):
        training = train_tracked(tmp_path, failing, other)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(
        f"the tracker NoteTracker failed in {method} and is left out of this session"
    )
    assert "OSError: the disk is full. The run goes on, and records.jsonl holds all" in text
    assert [call[0] for call in failing.calls].count(method) == 1
    assert failing.calls[-1][0] == method
    assert timeless(other) == [(row["step"], list_numbers(row)) for row in rows(tmp_path)]
    assert other.calls[-1] == ("close",)
    assert same(training.state, train_small().state)  # bit for bit


def test_a_tracker_that_failed_is_tried_again_by_the_next_session(tmp_path):
    failing, whole = NoteTracker(failing="begin"), NoteTracker()
    train_tracked(tmp_path, failing, stop=5)
    failing.failing = None
    train_tracked(tmp_path, failing)
    assert [call[0] for call in failing.calls].count("begin") == 2
    first = failing.calls[1][2]  # the update that the second session begins with
    train_tracked(tmp_path / "whole", whole)
    assert timeless(failing) == [(t, values) for t, values in timeless(whole) if t >= first]


def test_ctrl_c_is_no_failure_of_a_tracker(tmp_path):
    class Stopped(NoteTracker):
        def log(self, step, values):
            raise KeyboardInterrupt("the user's")

    with pytest.raises(KeyboardInterrupt, match="the user's"):
        train_tracked(tmp_path, Stopped())
    train_tracked(tmp_path)  # the folder is free


@pytest.mark.parametrize("tracker", ["tensorboard", NoteTracker, object()])
def test_what_is_no_tracker_is_refused_before_anything_is_made(tmp_path, tracker):
    with pytest.raises(RunError, match=r"with begin, log, flush and close\. .*tracker_named"):
        ab.Run(tmp_path / "run", trackers=[tracker])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_whose_package_is_missing_says_what_to_install(monkeypatch, name):
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorb")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("tensorboard", "mlflow.tracking", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=rf"records hold all.*pip install 'anybatch\[{name}\]'"):
        tracker_named(name)


def test_an_unknown_tracker_is_refused_with_the_names_there_are():
    with pytest.raises(RunError, match=r"no tracker 'tensorbord'. Choose one of mlflow, tensorb"):
        tracker_named("tensorbord")


def test_a_users_own_tracker_is_one():
    assert isinstance(NoteTracker(), Tracker)
    assert not isinstance(object(), Tracker)  # control
