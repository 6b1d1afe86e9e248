"""[observe], [track] and clipping of examples in recipes; `anybatch examples`."""

from pathlib import Path

import pytest

import anybatch as ab
from anybatch.errors import RecipeError
from anybatch.recipe.build import build
from anybatch.runs.ledger_files import read_ledger
from anybatch.runs.records import read_records
from command_line import recipe, refuse, run_command, write_recipe

STEPS = 6  # of 256 of 1,438 digits


def test_what_is_observed_is_kept_and_the_examples_that_drive_the_run_are_listed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, observe={"norms": True, "share": True}, run={"epochs": 2})
    run = Path(run_command("train", path, "--json").report["run"])
    columns = read_ledger(run)
    assert len(columns["norm"]) == 2 * 1438
    result = run_command("examples", run, "--top", 3, "--by", "norm", "--json").report
    norms = [row["norm"] for row in result["examples"]]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] == pytest.approx(max(norms_by_example(columns)), rel=1e-6)
    assert len(run_command("examples", run, "--json").report["examples"]) == 20
    table = run_command("examples", run, "--top", 3, "--by", "forgetting").out
    assert "forgetting" in table
    assert "cannot tell 'forgetting'" not in table
    on = run_command("resume", run, "--set", "run.epochs=3", "--json").report
    assert on["complete"]
    assert len(read_ledger(run)["norm"]) == 3 * 1438


def norms_by_example(columns):
    """Mean of both visits, by a loop."""
    result = {}
    for example, norm in zip(columns["example"].tolist(), columns["norm"].tolist(), strict=True):
        result.setdefault(example, []).append(norm)
    return [sum(norms) / len(norms) for norms in result.values()]


def test_a_run_without_a_ledger_says_how_to_keep_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_command("train", write_recipe(tmp_path), "--json").report["run"]
    assert "has no ledger: there are no files in" in refuse("examples", run)
    assert "is no run" in refuse("examples", "nowhere")


def test_examples_are_clipped_as_the_recipe_says():
    setup = build(recipe(**{"optimizer.clip_examples": 0.5}), allow_code=False)
    assert setup.clip == ab.ClipExamples(0.5)
    assert setup.observe is None
    both = {"optimizer.clip_examples": 0.5, "optimizer.clip_norm": 0.5}
    with pytest.raises(RecipeError, match="clip_norm and clip_examples cannot both"):
        recipe(**both)


def test_trackers_get_the_figures_and_may_change_on_resume(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, track={"to": ["tensorboard"], "smoothing": 0.5})
    run = Path(run_command("train", path, "--json").report["run"])
    assert list((run / "tensorboard").iterdir())
    rows = [row for row in read_records(run / "records.jsonl") if row["kind"] == "step"]
    average = rows[0]["parts"]["data"]
    for row in rows[1:]:
        average = 0.5 * average + 0.5 * row["parts"]["data"]
    assert rows[-1]["averages"]["data"] == pytest.approx(average, rel=1e-12)
    changes = ("--set", "run.epochs=2", "--set", "track.to=[]")
    assert run_command("resume", run, *changes, "--json").report["step"] == 2 * STEPS
