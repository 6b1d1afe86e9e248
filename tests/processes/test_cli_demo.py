"""`anybatch demo`, and the bar of a session in a terminal."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from anybatch.cli import session
from command_line import STEPS_AN_EPOCH, Terminal, anybatch, run_command, write_recipe

COMMAND = [sys.executable, "-c", "import sys; from anybatch.cli import main; main(sys.argv[1:])"]


def measure_child_seconds() -> float:
    """Return the processor time of the processes that have ended: a busy machine adds little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_demo_answers_trains_and_names_the_run_and_the_next_command(tmp_path: Path) -> None:
    beginning = measure_child_seconds()
    ended = subprocess.run([*COMMAND, "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert measure_child_seconds() - beginning < 60
    assert (ended.returncode, ended.stderr) == (0, "")
    text = " ".join(ended.stdout.replace("│", " ").split())
    ideas = re.findall(
        r"^ +([a-z].*\w) +(\d\.\d{3}) +(-?\d\.\d{3}) +(\d\.\d\d)$", ended.stdout, re.M
    )
    assert ideas == read_wrong_ideas_of_the_page()
    for figure in ("example 1 loss +2", "epoch 20/20", "anybatch predict runs/demo-1"):
        assert figure in text
    page = re.search(r"file://(\S+\.html)", ended.stdout)
    assert page is not None
    assert "<html" in Path(page[1]).read_text()[:200]
    commands = re.findall(r"^  (\S+ (?:examples|predict|scale) .*)$", ended.stdout, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:  # as typed, in a shell that has no path to the program
        typed = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True)
        assert typed.returncode == 0, typed.stderr
    assert max(map(len, re.sub(r"file://\S+", "", ended.stdout).splitlines())) <= 80
    evaluated = subprocess.run(
        [*COMMAND, "verify", "runs/demo-1", "--json"], cwd=tmp_path, capture_output=True, check=True
    )
    assert json.loads(evaluated.stdout)["ok"] is True
    listed = subprocess.run(
        [*COMMAND, "examples", "runs/demo-1", "--top", "3", "--json"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    drivers = json.loads(listed.stdout)["examples"]
    assert [row["visits"] for row in drivers] == [20] * 3
    assert drivers[0]["norm"] >= drivers[1]["norm"] > 0


def read_wrong_ideas_of_the_page() -> list[tuple[str, ...]]:
    """Return names and figures from docs/answers.md, which a test computes again in NumPy."""
    page = (Path(__file__).parents[2] / "docs" / "answers.md").read_text(encoding="utf8")
    row = r"^([a-z].*\w) +distance (\S+)  cosine +(\S+)  loss (\S+)$"
    result = re.findall(row, page, re.MULTILINE)
    assert len(result) == 7
    return result


def test_the_demo_in_json_has_the_figures_of_all_five_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_command("demo", "--json").report
    assert len(result["answers"]) == 5
    assert all(answer["figures"] for answer in result["answers"])
    assert [idea["curve"][-1][1] for idea in result["wrong_ideas"]] == [
        idea["loss"] for idea in result["wrong_ideas"]
    ]
    assert len({idea["name"] for idea in result["wrong_ideas"]}) == 7
    assert result["held_out"]["accuracy"] > 0.97
    assert result["run"] == "runs/demo-1"


def test_the_bar_shows_loss_accuracy_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=80, soft_wrap=True)
    monkeypatch.setattr(session, "console", console)
    slowly = "import time, anybatch.zoo as zoo\ndef losses(model, batch):\n    time.sleep(0.03)\n"
    Path("slowly.py").write_text(slowly + "    return zoo.cross_entropy(model, batch)\n")
    recipe = write_recipe(Path(), objective={"loss": "slowly:losses"}, run={"epochs": 4})
    assert anybatch("train", recipe, "--out", "run").code == 0
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())  # no colours, no cursor
    assert re.search(r"epoch 4/4  loss \d\.\d{4}  held out: loss \d\.\d{4}  accuracy 0\.", frames)
    bar = r"━+ +\d+/24 loss \d\.\d+  accuracy 0\.\d+ +0:00:0\d"
    assert len(re.findall(bar, frames)) > 1


def test_the_bar_of_a_resumed_run_counts_only_its_own_updates_towards_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bars = []
    update = session._Bar.update
    monkeypatch.setattr(
        session._Bar,
        "update",
        lambda bar, product: (bars.append(bar._bar), update(bar, product))[1],
    )
    run_command("train", write_recipe(Path()), "--set", "run.epochs=3", "--out", "run")
    run_command("resume", "run", "--set", "run.epochs=4")
    task = bars[-1].tasks[0]
    assert task.completed == 4 * STEPS_AN_EPOCH
    assert sum(sample.completed for sample in task._progress) <= STEPS_AN_EPOCH
