"""A signal ends a command with its own exit code and without a traceback, at many moments.

The moments are spread over the whole life of a process, and some are chosen by what it imports or
calls. Control: without the handlers a signal at the same moments prints a traceback, or kills.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import write_module, write_recipe

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

AT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv = ["anybatch", *{arguments!r}]
from anybatch.cli import main
main()
"""

IMPORTS = [
    *("typer", "anybatch.cli.train", "torch", "torch._C", "torch.nn", "numpy", "numpy.linalg"),
    *("anybatch.recipe.build", "anybatch.training.loop", "anybatch.cli.session", "sklearn"),
]

CALLS = """
import os, signal
import torch.nn.functional as F
from anybatch.data.scikit_learn import load_digits

def send():
    os.kill(os.getpid(), {number})

class Lost:
    def __del__(self):
        send()

def data():
    if {moment!r} == "data":
        send()
    if {moment!r} == "a destructor":
        Lost()
    return load_digits()

def losses(model, batch):
    if {moment!r} == "evaluation" and not model.training:
        send()
    if {moment!r} == "an update" and model.training:
        send()
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def wait_for_end(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("name", IMPORTS)
def test_a_signal_during_an_import_ends_the_command(name: str, number: signal.Signals) -> None:
    arguments = ["train", str(write_recipe(Path())), "--out", "run"]
    result = wait_for_end(AT.format(name=name, number=int(number), arguments=arguments))
    assert result.returncode == CODES[number], result.stderr
    assert "Traceback" not in result.stderr


def test_without_handlers_a_signal_during_an_import_is_told_by_a_traceback() -> None:
    """The control: arguments that are not those of the process leave its signals alone."""
    text = AT.format(name="typer", number=int(signal.SIGINT), arguments=["--help"])
    result = wait_for_end(text.replace("main()", "main(['--help'])"))
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["data", "a destructor", "evaluation", "an update"])
def test_a_signal_in_a_call_ends_the_command(moment: str, number: signal.Signals) -> None:
    write_module(Path.cwd(), "signalling", CALLS.format(moment=moment, number=int(number)))
    keys = {"objective": {"loss": "signalling:losses"}, "data": {"name": "signalling:data"}}
    recipe = write_recipe(Path(), **keys, run={"epochs": 3})
    command = [sys.executable, "-m", "anybatch", "train", recipe, "--out", "run", "--allow-code"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == CODES[number], result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_signals_spread_over_the_life_of_a_process(number: signal.Signals) -> None:
    recipe, command = write_recipe(Path()), [sys.executable, "-m", "anybatch", "train"]
    beginning = time.monotonic()
    whole = subprocess.run([*command, recipe, "--out", "whole"], capture_output=True, timeout=120)
    lasts = time.monotonic() - beginning
    assert whole.returncode == 0
    codes = []
    for i in range(1, 10):
        process = subprocess.Popen(
            [*command, recipe, "--out", f"run-{i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.15 + lasts * i / 9)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        codes.append(process.returncode)
    assert set(codes) <= {CODES[number], 0, -number}  # 0 where it was over; -number: in its last ms
    assert CODES[number] in codes
