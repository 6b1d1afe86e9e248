"""Ctrl-C, termination, and readers that go away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import (
    NUM_TRAIN,
    STEPS_AN_EPOCH,
    anybatch,
    run_command,
    write_module,
    write_recipe,
)

COMMAND = [sys.executable, "-c", "import sys; from anybatch.cli import main; main(sys.argv[1:])"]

SIGNALLING = """
import os, signal
import torch.nn.functional as F

calls = 0

def losses(model, batch):
    global calls
    calls += model.training
    for number in {numbers}:
        if calls == {at} and model.training:
            os.kill(os.getpid(), number)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "signalling", raising=False)


def digest(run: str) -> str:
    """Return the digest that `verify` gives."""
    return str(run_command("verify", run, "--json").report["digest"])


def recipe(at: int, *numbers: int) -> Path:
    """A recipe of three epochs whose loss sends signals to its own process in one update."""
    text = SIGNALLING.format(at=at, numbers=tuple(map(int, numbers)))
    write_module(Path.cwd(), "signalling", text)
    sections = {"objective": {"loss": "signalling:losses"}, "run": {"epochs": 3}}
    return write_recipe(Path(), **sections)


@pytest.mark.smoke
def test_ctrl_c_in_a_real_process_saves_and_resuming_ends_as_if_uninterrupted() -> None:
    many = write_recipe(Path(), run={"epochs": 100000})
    process = subprocess.Popen(
        [*COMMAND, "train", many, "--out", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(Path().glob("run/checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped and saved. Continue with: anybatch resume run\n" in out
    assert "Traceback" not in err
    product = run_command("verify", "run", "--json").report["step"]
    assert product > 0
    epochs = f"run.epochs={product // STEPS_AN_EPOCH + 2}"
    run_command("resume", "run", "--set", epochs)
    run_command("train", many, "--set", epochs, "--out", "whole")
    assert digest("run") == digest("whole")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_amid_an_epoch_finishes_the_update_and_saves_it(number: int, code: int) -> None:
    ended = anybatch("train", recipe(8, number), "--out", "run", "--json")
    assert ended.code == code
    assert (ended.report["complete"], ended.report["step"]) == (False, 8)
    assert run_command("verify", "run", "--json").report["step"] == 8
    run_command("resume", "run", "--allow-code")
    run_command("train", recipe(-1, number), "--out", "whole")
    assert digest("run") == digest("whole")


def test_the_digest_tells_a_run_that_lost_an_update() -> None:  # the control of the two above
    run_command("train", recipe(-1), "--out", "whole")
    few = ("--set", f"batch.size={NUM_TRAIN}", "--set", "run.epochs=1")
    run_command("train", recipe(-1), *few, "--out", "fewer")
    assert digest("whole") != digest("fewer")


def test_a_signal_in_the_last_update_is_an_ordinary_end() -> None:
    ended = anybatch("train", recipe(3 * STEPS_AN_EPOCH, signal.SIGINT), "--out", "run", "--json")
    assert (ended.code, ended.report["complete"]) == (0, True)


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint() -> None:
    ended = anybatch("train", recipe(8, signal.SIGINT, signal.SIGINT), "--out", "run")
    assert ended.code == 130
    command = "anybatch resume run --allow-code"  # the loss is the user's own
    assert f"Continue from the last checkpoint: {command}\n" in ended.err
    assert run_command("verify", "run", "--json").report["step"] == STEPS_AN_EPOCH
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_before_the_first_update_leaves_no_run() -> None:
    ended = anybatch("train", recipe(1, signal.SIGINT, signal.SIGINT), "--out", "run")
    assert ended.code == 130
    assert ended.err.endswith("anybatch: stopped; nothing was written.\n")
    assert not Path("run").exists()


def test_ctrl_c_while_the_data_are_read_leaves_no_run() -> None:
    text = "import os, signal\ndef data():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    write_module(Path.cwd(), "signalling", text)
    ended = anybatch("train", write_recipe(Path(), data={"name": "signalling:data"}))
    assert (ended.code, ended.err) == (130, "anybatch: stopped; nothing was written.\n")
    assert not Path("runs").exists()


def test_a_reader_that_goes_away_is_no_error() -> None:
    run_command("train", write_recipe(Path()), "--out", "run")
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [
            *COMMAND,
            "predict",
            "run",
            "--split",
            "train",
            "--rows",
            "2000",
        ],  # more than a pipe holds
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert os.read(reading, 3) == b"run"
    os.close(reading)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")
