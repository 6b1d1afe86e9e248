"""A process killed by SIGKILL at any moment, and started again with the same script.

The oracle is the same script in this process, which nothing stops: the digest of its last
checkpoint, and its records. Bit for bit, so there is no tolerance.
"""

import json
import subprocess
import sys

import pytest

import killed_training
from anybatch.runs import checkpoints
from small_training import rows, train_small


def digest(folder):
    scan = checkpoints.find_newest(folder / "checkpoints")
    assert scan.refusals == ()
    assert scan.checkpoint.step == 9
    return scan.checkpoint.digest


@pytest.fixture(scope="module")
def kill_runs(tmp_path_factory):
    """Count the kills of each run, by its folder; and return the folder of a run without kills."""
    root = tmp_path_factory.mktemp("killed")
    killed_training.script(root / "whole")
    done = subprocess.run(
        [sys.executable, killed_training.__file__, root],
        check=True,
        timeout=1500,
        capture_output=True,
        text=True,
    )
    events = max(int(line) for line in done.stderr.splitlines() if line.isdigit())  # else warnings
    return {root / name: n for name, n in json.loads(done.stdout).items()}, root / "whole", events


def test_killed_runs_end_in_the_bits_of_one_that_was_not(kill_runs):
    kills, whole, _ = kill_runs
    for folder in kills:
        assert digest(folder) == digest(whole), folder


def test_killed_runs_have_the_records_of_one_that_was_not(kill_runs):
    kills, whole, _ = kill_runs
    assert len(rows(whole)) == 18
    for folder in kills:
        assert rows(folder) == rows(whole), folder


def test_kills_came_at_every_moment(kill_runs):
    kills, _, events = kill_runs
    assert events > killed_training.NUM_EVENTS  # else the moments drawn miss the run's end
    at_events = [times for folder, times in kills.items() if folder.name.startswith("event")]
    assert min(at_events) >= 1
    assert sum(at_events) > 1.5 * len(at_events)


def test_a_session_is_noted_for_each_start_that_got_so_far(kill_runs):
    kills, _, _ = kill_runs
    for folder, times in kills.items():
        sessions = rows(folder, "session")
        assert 1 <= len(sessions) <= times + 1
        assert [row["step"] for row in sessions] == sorted(row["step"] for row in sessions)


def test_the_digest_sees_a_run_that_was_trained_otherwise(kill_runs, tmp_path):
    """Control."""
    train_small(tmp_path, seed=8)
    assert digest(tmp_path) != digest(kill_runs[1])
