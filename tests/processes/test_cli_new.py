"""`anybatch new`: a project that trains at once, whose own test passes and can fail.

Oracle: pytest and the command line in processes of their own, as a user calls them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import files_of, refuse, run_command

SOURCES = str(Path(__file__).parents[2] / "src")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCES)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python's as a user does."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


def test_a_new_project_trains_from_any_folder_and_each_next_step_works_as_typed() -> None:
    assert "anybatch train my-project/recipe.toml" in run_command("new", "my-project").out
    trained = call("anybatch", "train", "my-project/recipe.toml", "--set", "run.epochs=8")
    assert (trained.returncode, trained.stderr) == (0, "")
    typed = [line for line in trained.stdout.splitlines() if re.match("  .*anybatch ", line)]
    names = [line.split("anybatch ")[1].split()[0] for line in typed]
    assert names == ["explain", "examples", "predict", "compare"]
    for line in typed[:3]:
        ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, ""), line
    run = "runs/my-project-1"
    result = json.loads(call("anybatch", "evaluate", run, "--allow-code", "--json").stdout)
    assert result["metrics"]["accuracy"] > 0.5  # three classes: chance is a third
    inside = subprocess.run(
        [sys.executable, "-m", "anybatch", "train", "recipe.toml", "--set", "run.epochs=1"],
        cwd="my-project",
        capture_output=True,
    )
    assert inside.returncode == 0


def test_predictions_have_the_labels_of_the_recipe() -> None:
    run_command("new", "mine")
    call("anybatch", "train", "mine/recipe.toml", "--set", "run.epochs=8", "--out", "run")
    output = call("anybatch", "predict", "run", "--allow-code").stdout
    cells = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    words = [[cell.strip() for cell in row] for row in cells]
    arms = Path("mine/points.csv").read_text().splitlines()[1:]
    assert len(words) == 20
    assert all(target == arms[int(one)].split(",")[2] for one, target, _, _ in words)
    assert all((target == label) == (right == "yes") for _, target, label, right in words)
    assert {label for _, _, label, _ in words} <= {"red", "green", "blue"}


def test_its_test_passes_and_fails_once_the_loss_is_averaged() -> None:
    run_command("new", "mine")
    passed = call("pytest", "-q", "-p", "no:cacheprovider", "mine")
    assert passed.returncode == 0, passed.stdout
    loss = Path("mine/loss.py")
    loss.write_text(loss.read_text().replace('reduction="none"', 'reduction="mean"'))
    failed = call("pytest", "-q", "-p", "no:cacheprovider", "mine")  # the control
    assert failed.returncode == 1
    assert "LossError" in failed.stdout


def test_its_files_keep_the_rules_of_ruff() -> None:
    run_command("new", "mine")
    for command in (["check"], ["format", "--check"]):
        ended = call("ruff", *command, "--isolated", "--line-length", "100", "mine")
        assert ended.returncode == 0, ended.stdout


def test_a_folder_that_holds_anything_is_left_alone() -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    before = files_of(Path())
    assert "mine exists already. Nothing in it was touched." in refuse("new", "mine")
    assert "file exists already" in refuse("new", "file")
    assert "nowhere is no folder" in refuse("new", "nowhere/mine")
    assert files_of(Path()) == before
    Path("empty").mkdir()
    result = run_command("new", "empty", "--json").report  # the control
    assert set(result["files"]) == {path.name for path in Path("empty").iterdir()}
