"""Compiled updates in recipes and on the command line. Oracle: the same run by plain updates."""

from pathlib import Path

import pytest
import torch

from anybatch.runs.records import read_records
from anybatch.training import compiled_updates, whole_update
from command_line import anybatch, refuse, run_command, write_recipe


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setattr(whole_update, "BACKEND", "eager")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read_rows(folder, kind):
    return [row for row in read_records(Path(folder) / "records.jsonl") if row["kind"] == kind]


def test_a_recipe_trains_compiled_and_resumes(tmp_path):
    recipe = write_recipe(tmp_path)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    run_command("train", recipe, "--out", plain, "--set", "run.epochs=2")
    run_command("train", recipe, "--out", compiled, "--set", "run.compile=true")
    run_command("resume", compiled, "--set", "run.epochs=2")
    losses = [[row["loss"] for row in read_rows(run, "step")] for run in (plain, compiled)]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # float32
    rows = [(row["step"], row["updates"]) for row in read_rows(compiled, "compile")]
    assert rows == [(1, "compiled"), (7, "compiled")]
    message = refuse("resume", compiled, "--set", "run.compile=false")
    assert "run.compile" in message


def test_auto_says_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_updates, "_NUM_TIMED", 2)
    run = tmp_path / "run"
    ended = anybatch("train", write_recipe(tmp_path), "--out", run, "--set", 'run.compile="auto"')
    assert ended.code == 0
    assert 'anybatch: compile="auto" goes on with plain updates: compiling takes' in ended.err
    (row,) = read_rows(run, "compile")
    assert row["why"].startswith("compiling takes longer than it would save in 4 updates of")


def test_bits_and_models_that_draw_are_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    both = ("--set", "run.compile=true", "--set", "run.bitwise=true")
    message = refuse("train", recipe, "--out", tmp_path / "run", *both)
    assert "bitwise and compile cannot both be set" in " ".join(message.split())
    norms = ("--set", "run.compile=true", "--set", "observe.norms=true")
    message = " ".join(refuse("train", recipe, "--out", tmp_path / "run", *norms).split())
    assert "compile=True cannot compile this training: observe= is set" in message
