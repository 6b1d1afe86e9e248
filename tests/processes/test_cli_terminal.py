"""Commands on a terminal of 80 columns: no word is cut, and no long silence at the start.

The command line runs in a process of its own on a pseudo-terminal, whose text is read as it comes.
A line of 80 columns that ends amid a word is found by the words of the same text in a pipe.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from command_line import run_command, write_recipe

SOURCES = str(Path(__file__).parents[2] / "src")
COMMAND = [sys.executable, "-m", "anybatch"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    monkeypatch.setenv("TERM", "xterm")
    # The program's name in suggested commands is then `anybatch`, wherever this checkout lies.
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def on_a_terminal(*arguments: str, columns: int = 80) -> str:
    """Everything that a command shows on a terminal, without colours and cursor movements."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        text += more
        if not more:
            break
    os.close(ours)
    process.wait(timeout=120)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    return plain.replace("\r\n", "\n")


def lines_too_long(text: str) -> list[str]:
    """Lines that a terminal of 80 columns breaks wherever they happen to be."""
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if len(line) > 80 and " " in line[2:].strip()]


def test_pytorch_is_told_before_anything_else_and_only_on_a_terminal() -> None:
    output = on_a_terminal("evaluate", "nowhere")
    assert output.startswith("Starting PyTorch ...\nanybatch: nowhere is no run")
    piped = subprocess.run([*COMMAND, "evaluate", "nowhere"], capture_output=True, text=True)
    assert "Starting" not in piped.stdout + piped.stderr
    assert "Starting" not in on_a_terminal("recipes")  # which does not need it


def test_no_word_is_cut_in_a_whole_session() -> None:
    run_command("train", write_recipe(Path()), "--out", "run")
    for arguments in (
        ("--help",),
        ("recipes",),
        ("train", "recipe.toml", "--set", "data.validation=0.2", "--out", "more"),
        ("runs", "."),
        ("show", "run"),
        ("predict", "run"),
        ("evaluate", "run", "--split", "train"),
        ("train", "recipe.toml", "--set", "optimizer.learning_rate=3"),
        ("train", "lenet"),
        ("compare", "recipe.toml"),
    ):
        assert lines_too_long(on_a_terminal(*arguments)) == [], arguments


def test_a_message_in_a_pipe_is_one_line() -> None:  # the control: it would be cut
    ended = subprocess.run([*COMMAND, "compare", "a.toml"], capture_output=True, text=True)
    assert ended.stderr.count("\n") == 1
    assert lines_too_long(ended.stderr)
