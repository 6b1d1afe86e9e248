"""A comparison that is cut off, by Ctrl-C or a kill, goes on where it was.

Oracle: the same comparison left alone, whose runs have the same digests.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anybatch.runs.records import read_records
from command_line import run_command, write_module, write_recipe

COMMAND = [sys.executable, "-c", "import sys; from anybatch.cli import main; main(sys.argv[1:])"]
SECONDS = 400  # a busy machine may take long to get anywhere

SLOW = """
import time
from anybatch.zoo import cross_entropy

def losses(model, batch):
    if model.training:
        time.sleep({seconds})
    return cross_entropy(model, batch)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "slow", raising=False)


def begin(seconds: float) -> tuple[subprocess.Popen[str], list[str]]:
    """Compare a quick recipe with one whose updates take so many seconds."""
    write_module(Path.cwd(), "slow", SLOW.format(seconds=seconds))
    write_recipe(Path(), run={"epochs": 3}).rename("a.toml")
    write_recipe(Path(), run={"epochs": 3}, objective={"loss": "slow:losses"}).rename("b.toml")
    call = ["compare", "a.toml", "b.toml", "--seeds", "2", "--jobs", "2", "--out", "cut"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *call], start_new_session=True, **pipes), call


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


def list_saved() -> list[Path]:
    """Checkpoints of the slow recipe."""
    return list(Path().glob("cut/b/seed-*/checkpoints/step-*[0-9]"))


def outcomes() -> set[str]:
    return {str(file.parent) for file in Path().glob("cut/*/*/outcome.json")}


def digests(folder: str) -> list[str]:
    runs = [f"{folder}/{name}/seed-{seed}" for name in "ab" for seed in (0, 1)]
    return [run_command("verify", run, "--json").report["digest"] for run in runs]


def is_free(lock: Path) -> bool:
    """Return whether no process writes into a run."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def goes_on_to_the_same(call: list[str], done: set[str]) -> None:
    """Check that the command ends as if it had not been cut off, and repeats no finished run."""
    assert len(outcomes()) < 4
    write_module(Path.cwd(), "slow", SLOW.format(seconds=0))
    message = run_command(*call).out
    if done:
        assert f"{len(done)} of 4 runs are done already" in message
    run_command(*call[:-1], "whole")
    assert digests("cut") == digests("whole")
    for run in done:
        sessions = [row for row in read_records(Path(run, "records.jsonl")) if "torch" in row]
        assert len(sessions) == 1


def test_ctrl_c_saves_all_runs_and_the_same_command_goes_on() -> None:
    process, call = begin(0.1)
    wait_for(list_saved)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert err == (
        "anybatch: stopping after the updates at hand; once more stops at once\n"
        f"anybatch: stopped and saved. Continue with: anybatch {' '.join(call[:-4])} --out cut\n"
    )
    assert all(map(is_free, Path().glob("cut/*/*/lock")))
    goes_on_to_the_same(call, outcomes())


def test_runs_save_and_end_when_the_process_that_began_them_is_killed() -> None:
    process, call = begin(0.1)
    wait_for(list_saved)
    process.kill()
    process.communicate(timeout=SECONDS)
    wait_for(lambda: all(map(is_free, Path().glob("cut/*/*/lock"))))
    steps = {int(path.name[5:]) for path in list_saved()}
    assert max(steps) < 18  # they did not go on to the end
    goes_on_to_the_same(call, outcomes())


def test_a_second_ctrl_c_stops_at_once() -> None:
    process, _ = begin(1000.0)
    wait_for(lambda: list(Path().glob("cut/b/seed-*/recipe.toml")))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("anybatch: stopping after the updates at hand")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert all(map(is_free, Path().glob("cut/*/*/lock")))
