"""Commands on several ranks: the same weights, one message for each mistake, no rank left behind.

Oracle: the same command in this process alone. Tolerance: 1e-12 in float64, for sums in another
order. Commands called in this process share the one process that their ranks are forked from.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
from torch.utils._pytree import tree_leaves

from anybatch.cli.ranks import _end, _Report
from anybatch.errors import AnybatchError
from anybatch.runs import checkpoints
from anybatch.training.launch import GRACE_SECONDS
from command_line import anybatch, refuse, run_command, write_module, write_recipe
from small_training import rows

# Grains of 32 with dropout and batch normalisation; the last batch of an epoch has 158 examples.
# Once, in the rank and at the call that the file "accident" says, something happens.
MODULE = """
import os, signal, time
from pathlib import Path
import torch.nn.functional as F
from torch import nn

calls = 0

def network():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 10)
    )

def losses(model, batch):
    global calls
    calls += model.training
    if Path("accident").exists():
        what, rank, at = Path("accident").read_text().split()
        if calls == int(at) and os.environ.get("LOCAL_RANK") == rank:
            Path("accident").unlink()
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise OSError("a hole in the disk")
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
COMMAND = [sys.executable, "-m", "anybatch"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "accidents", raising=False)
    write_module(tmp_path, "accidents", MODULE)


def recipe(**run: object) -> Path:
    return write_recipe(
        Path(),
        model={"name": "accidents:network"},
        objective={"loss": "accidents:losses", "grain": 32},
        optimizer={"args": {"momentum": 0.9}, "lr": 0.1},
        average={"decay": 0.9},
        run={"epochs": 2, "dtype": "float64", "threads": 1, **run},
    )


def state(run: str) -> torch.Tensor:
    """All numbers of a run's newest checkpoint, but for the generators of its process."""
    scan = checkpoints.find_newest(Path(run) / "checkpoints")
    assert scan.checkpoint is not None
    contents = checkpoints.load(scan.checkpoint)
    leaves = tree_leaves({key: value for key, value in contents.items() if key != "generators"})
    numbers = [torch.as_tensor(leaf) for leaf in leaves if not isinstance(leaf, str | None)]
    return torch.cat([number.double().flatten() for number in numbers])


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


def accident(what: str, rank: int, call: int) -> None:
    Path("accident").write_text(f"{what} {rank} {call}")


@pytest.mark.smoke
def test_a_run_of_four_ranks_ends_as_that_of_one_process() -> None:
    train = ("train", recipe())
    run_command(*train, "--out", "ranks", "--ranks", 4)
    run_command(*train, "--out", "alone")
    assert distance(state("ranks"), state("alone")) < 1e-12
    assert Path("ranks", "recipe.toml").read_bytes() == Path("alone", "recipe.toml").read_bytes()
    result, expected = rows(Path("ranks")), rows(Path("alone"))
    assert len(result) == len(expected) == 14
    for one, other in zip(result, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert one["metrics"] == other["metrics"]
    run_command(*train, "--out", "other", "--set", "run.seed=1")
    assert distance(state("other"), state("alone")) > 1e-3  # the control


def test_a_killed_rank_stops_the_others_and_any_number_goes_on() -> None:
    path = recipe(checkpoint_every=2)
    accident("kill", 1, 30)  # of some 4 grains an update
    beginning = time.monotonic()
    message = refuse("train", path, "--out", "run", "--ranks", 2)
    assert (
        time.monotonic() - beginning < GRACE_SECONDS + 120
    )  # on a busy machine; the first command also imports
    assert message.startswith("anybatch: rank 1 was killed by SIGKILL (is memory short?)")
    assert not Path("accident").exists()
    for ranks, epochs in ((3, 2), (1, 3), (4, 4)):
        options = ("--allow-code", "--set", f"run.epochs={epochs}", "--ranks", ranks)
        run_command("resume", "run", *options)
    run_command("train", path, "--out", "alone", "--set", "run.epochs=4")
    assert distance(state("run"), state("alone")) < 1e-12
    sessions = [row for row in rows(Path("run"), "session") if "ranks" in row]
    assert [row["ranks"] for row in sessions] == [2, 3, 1, 4]
    assert 0 < sessions[1]["step"] < 12


def test_an_error_of_one_rank_is_told_once_with_the_rank_and_the_place() -> None:
    accident("raise", 1, 10)
    ended = anybatch("train", recipe(checkpoint_every=1), "--out", "run", "--ranks", 3, "--json")
    assert ended.code == 2
    assert re.fullmatch(
        r"anybatch: on rank 1: OSError: a hole in the disk\n"
        r"  in your own code at .*accidents\.py:\d+\n",
        ended.err,
    )
    assert ended.report == {"ok": False, "error": ended.err.removeprefix("anybatch: ").strip()}
    assert run_command("verify", "run", "--json").report["step"] > 0


def test_mistakes_of_the_user_are_told_as_ever() -> None:
    path = recipe()
    assert "did you mean 'digits'" in refuse(
        "train", path, "--set", "data.name=digitz", "--ranks", 2
    )
    Path("run").mkdir()
    Path("run", "notes").touch()
    message = refuse("train", path, "--out", "run", "--ranks", 2)
    assert message.startswith("anybatch: on rank 0: run exists and is no run")
    assert "is no run" in refuse("resume", "run", "--ranks", 2)
    assert not Path("runs").exists()


def processes_of(folder: Path) -> list[int]:
    """Return the processes that work in a folder, without this one."""
    result = []
    for process in {*Path("/proc").glob("[0-9]*")} - {Path("/proc", str(os.getpid()))}:
        try:
            if os.readlink(process / "cwd") == str(folder):
                result.append(int(process.name))
        except OSError:  # it has ended, or is another's
            pass
    return result


STOPPED = "Stopped and saved. Continue with: anybatch resume run --allow-code\n"


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_ctrl_c_saves_once_and_no_process_outlives_the_command(
    tmp_path: Path, number: int, code: int
) -> None:
    with start("--ranks", "2") as process:
        assert len(processes_of(tmp_path)) >= 3
        process.send_signal(number)
        out, err = process.communicate(timeout=300)  # until the last rank has closed them
    assert process.returncode == code
    assert out.count(STOPPED) == 1
    assert err == "\nstopping after this update; once more stops at once\n"
    wait_for(lambda: processes_of(tmp_path) == [])
    product = run_command("verify", "run", "--json").report["step"]
    assert product == rows(Path("run"))[-1]["step"] + 1


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="processes are found in /proc")
def test_a_signal_to_one_rank_stops_all_after_the_same_update(tmp_path: Path) -> None:
    with start("--ranks", "2") as process:
        rank = next(p for p in processes_of(tmp_path) if os.getsid(p) == p != process.pid)
        os.kill(rank, signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert out.count(STOPPED) == 1


def test_a_signal_to_all_processes_of_a_service_saves_too() -> None:
    with start("--ranks", "2", start_new_session=True) as process:
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert out.count(STOPPED) == 1


def test_a_reader_that_goes_away_stops_all_ranks(tmp_path: Path) -> None:
    with start("--ranks", "2") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(300) == 1
        wait_for(lambda: processes_of(tmp_path) == [])
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_the_cause_is_told_and_not_what_it_has_led_to(capsys: pytest.CaptureFixture[str]) -> None:
    missing = _Report(2, "a rank is gone", is_agreed=False)
    with pytest.raises(AnybatchError, match=r"^on rank 1: no such word$"):
        _end([missing, _Report(2, "no such word", is_cause=True, is_agreed=False), missing])
    with pytest.raises(AnybatchError, match=r"^on rank 2: no such word$"):
        _end([missing, missing, _Report(2, "on rank 2: no such word", is_cause=True)])
    with pytest.raises(AnybatchError, match=r"^no such word$"):  # the mistake of all
        _end([_Report(2, "no such word", is_cause=True, is_agreed=False)] * 3)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        _end([_Report(130, "stopped"), missing])
    with pytest.raises(typer.Exit, match=r"^1$"):
        _end([missing, _Report(1, None, "Traceback ...", is_cause=True, is_agreed=False)])
    assert capsys.readouterr().err == "on rank 1: Traceback ..."


@contextmanager
def start(*options: str, start_new_session: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A training without end, which has come to its first checkpoint."""
    command = [*COMMAND, "train", str(recipe(epochs=100000)), "--out", "run", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    how = {"text": True, "start_new_session": start_new_session, **pipes}
    with subprocess.Popen(command, **how) as process:
        try:
            wait_for(lambda: list(Path().glob("run/checkpoints/step-*[0-9]")))
            yield process
        finally:
            process.kill()


def wait_for(condition: object, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
