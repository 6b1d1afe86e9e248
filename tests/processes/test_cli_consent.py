"""Code of a run is asked about once, on a terminal, and the yes is kept outside of all runs.

The command line runs in a process of its own on a pseudo-terminal. Whether code was imported is
read off a file that the module writes when it is.
"""

import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import refuse, run_command

SOURCES = str(Path(__file__).parents[2] / "src")
MODULE = """
open("imported", "a").close()
import torch
from torch import nn

def net():
    return nn.Linear(4, 2)

def other():
    return nn.Linear(4, 2)

def data():
    return torch.arange(240.0).reshape(60, 4) / 240, torch.arange(60) % 2
"""
RECIPE = """
model.name = "mine:net"
data.name = "mine:data"
objective.loss = "cross_entropy"
optimizer = { name = "sgd", lr = 0.1 }
batch.size = 16
run = { epochs = 1, threads = 1 }
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one's own code, which has not been imported in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("own").mkdir()
    Path("own/mine.py").write_text(MODULE)
    Path("own/recipe.toml").write_text(RECIPE)
    run_command("train", "own/recipe.toml", "--out", "run", "--allow-code")
    forget_import()
    return Path("run")


def forget_import() -> None:
    sys.modules.pop("mine", None)
    Path("imported").unlink(missing_ok=True)


def on_a_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Call the command line on a terminal, type an answer once it asks; exit code and text."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "anybatch", *arguments], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    text, is_asked = "", False
    while select.select([ours], [], [], 120)[0]:
        try:
            text += os.read(ours, 4096).decode()
        except OSError:  # the other end is closed
            break
        if "[y/N]" in text and not is_asked:
            os.write(ours, f"{answer}\n".encode())
            is_asked = True
    os.close(ours)
    return process.wait(timeout=120), text


def test_a_yes_is_kept_until_a_file_changes_and_counts_for_that_code_alone(run: Path) -> None:
    code, text = on_a_terminal("y", "evaluate", "run")
    assert code == 0
    assert "mine:net" in text
    assert str(Path("own/mine.py").resolve()) in text
    code, text = on_a_terminal("", "evaluate", "run")
    assert (code, "[y/N]" in text) == (0, False)
    run_command("predict", "run")  # without a terminal, too

    forget_import()
    shutil.copytree("run", "theirs")  # a run of somebody else, which names another function
    recipe = Path("theirs/recipe.toml")
    recipe.write_text(recipe.read_text().replace("mine:net", "mine:other"))
    assert "repeat with --allow-code" in refuse("train", "theirs/recipe.toml", "--out", "new")
    assert not Path("imported").exists()

    Path("own/mine.py").write_text(MODULE + "\n# changed\n")
    assert "repeat with --allow-code" in refuse("evaluate", "run")
    assert not Path("imported").exists()
    rest = [path for path in Path("state").rglob("*") if path.is_file()]
    assert rest == [Path("state/anybatch/code.json")]


def test_the_question_shows_escape_sequences_of_a_name(run: Path) -> None:
    theirs = "run\x1b]0;title\x07\u202e"
    shutil.copytree(run, theirs)
    code, text = on_a_terminal("n", "evaluate", theirs)
    assert (code, "[y/N]" in text) == (2, True)
    assert ("\x1b]" in text, "\u202e" in text) == (False, False)
    assert "\\x1b]0;title" in text


@pytest.mark.parametrize("answer", ["n", "", "no", "what"])
def test_anything_but_yes_refuses_and_is_not_kept(run: Path, answer: str) -> None:
    code, text = on_a_terminal(answer, "evaluate", "run")
    assert (code, "repeat with --allow-code" in " ".join(text.split())) == (2, True)
    assert not Path("imported").exists()
    assert not Path("state").exists()


def test_a_copy_of_the_module_elsewhere_is_other_code(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_a_terminal("yes", "evaluate", "run")[0] == 0
    forget_import()
    Path("theirs").mkdir()
    shutil.copytree("run", "theirs/run")
    shutil.move("own", "gone")
    shutil.copy("gone/mine.py", "theirs/mine.py")  # byte for byte what was allowed
    monkeypatch.chdir("theirs")
    assert "repeat with --allow-code" in refuse("evaluate", "run")
    assert not Path("imported").exists()
    run_command("evaluate", "run", "--allow-code")  # the control
    assert Path("imported").exists()


def test_without_a_terminal_or_with_json_nobody_is_asked(run: Path) -> None:
    assert "repeat with --allow-code" in refuse("evaluate", "run")
    code, text = on_a_terminal("y", "evaluate", "run", "--json")
    assert (code, "[y/N]" in text) == (2, False)
    assert not Path("imported").exists()


def test_a_run_finds_its_code_from_any_folder_and_warns_once_it_has_changed(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run.resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run_command("evaluate", folder, "--allow-code")
    assert not caplog.messages
    with Path("../own/mine.py").open("a") as file:
        file.write("# changed\n")
    from command_line import anybatch

    ended = anybatch("evaluate", folder, "--allow-code")
    assert ended.code == 0
    assert "mine has changed since" in ended.err


@pytest.mark.parametrize("row", ['"code": 3', '"code": {"mine": 3}', '"code": {"mine": ["/", ""]}'])
def test_what_a_stranger_wrote_into_the_records_is_no_reason_for_a_traceback(
    run: Path, row: str
) -> None:
    with (run / "records.jsonl").open("a") as file:
        file.write(f'{{"kind": "session", "step": 0, {row}}}\n')
    assert "repeat with --allow-code" in refuse("evaluate", "run")


def test_a_recipe_that_lies_elsewhere_asks_too_and_one_in_this_folder_does_not() -> None:
    elsewhere = ("train", "own/recipe.toml", "--out", "elsewhere")
    assert "does not lie in the folder that you are in" in refuse(*elsewhere)
    assert not Path("imported").exists()
    code, text = on_a_terminal("n", *elsewhere)
    assert "names code, which runs with your rights" in text
    assert (code, Path("imported").exists()) == (2, False)
    assert on_a_terminal("y", *elsewhere)[0] == 0
    assert Path("imported").exists()
    run_command("train", "own/recipe.toml", "--out", "again")  # the answer is remembered
    shutil.copy("own/recipe.toml", "recipe.toml")
    Path("mine.py").write_text(MODULE + "\n")  # other bytes: nothing is remembered of these
    forget_import()
    run_command("train", "recipe.toml", "--out", "here")
