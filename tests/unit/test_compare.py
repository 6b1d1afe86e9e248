"""`anybatch compare`: recipes trained side by side in pairs, what is told, and what is refused.

Oracle: the same recipes trained by themselves, and the statistics by hand.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from anybatch.advice.entries import list_trials, make_entries
from anybatch.advice.plots import draw_chart
from anybatch.advice.side_by_side import Ended, train_side_by_side
from anybatch.advice.trial import read_curve
from anybatch.cli.mistakes import describe_error
from anybatch.runs.records import read_records
from command_line import (
    NUM_TRAIN,
    anybatch,
    recipe,
    refuse,
    run_command,
    write_module,
    write_recipe,
)

FIGURES = ["training loss", "held-out loss", "held-out accuracy"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipes(**second) -> tuple[str, str]:
    """Two recipes in the working folder, one with some keys changed."""
    write_recipe(Path()).rename("a.toml")
    write_recipe(Path(), **second).rename("b.toml")
    return "a.toml", "b.toml"


def digest(run: str) -> str:
    return run_command("verify", run, "--json").report["digest"]


@pytest.mark.slow
def test_recipes_are_trained_in_pairs_and_compared():
    a, b = recipes(batch={"size": 64})
    messages = run_command("compare", a, b, "--seeds", 2, "--set", "run.epochs=2").out
    for words in ("b minus a", "A a   B b", "first epoch is left out", *FIGURES):
        assert words in messages
    assert messages.count("held out: loss") == 4
    again = ("compare", a, b, "--seeds", 2, "--set", "run.epochs=2", "--json")
    result = run_command(*again).report
    folder = Path("runs/compare-a-b-1")
    assert result["folder"] == str(folder)
    assert result["runs"] == [str(folder / n / f"seed-{s}") for s in (0, 1) for n in "ab"]
    accuracies = {}
    for name in "ab":
        for seed in (0, 1):
            alone = ("--set", f"run.seed={seed}", "--set", "run.epochs=2", "--out", f"{name}{seed}")
            ended = run_command("train", f"{name}.toml", *alone, "--json").report
            accuracies.setdefault(name, []).append(ended["held_out"]["accuracy"])
            assert digest(f"{name}{seed}") == digest(folder / name / f"seed-{seed}")
    figure = result["figures"]["held-out accuracy"]
    assert figure["values"] == accuracies
    # Tolerance: means and differences of two numbers in float64.
    assert figure["mean"]["a"] == pytest.approx(np.mean(accuracies["a"]), rel=1e-12)
    differences = np.subtract(accuracies["b"], accuracies["a"])
    paired = figure["minus a"]["b"]
    assert paired["mean"] == pytest.approx(differences.mean(), rel=1e-9)
    half = 12.7062047 * differences.std(ddof=1) / np.sqrt(2)
    assert paired["high"] - paired["mean"] == pytest.approx(half, rel=1e-6)
    assert (result["training_loss_from"], result["training_loss_to"]) == (NUM_TRAIN, 2 * NUM_TRAIN)


@pytest.mark.slow
def test_the_training_loss_is_the_mean_over_examples_after_the_first_epoch():
    """Oracle: the plain Mean that the records of a run hold, weighted by examples, by a loop."""
    a, b = recipes()
    result = run_command("compare", a, b, "--seeds", 2, "--set", "run.epochs=2", "--json").report
    rows = read_records(Path(result["runs"][0], "records.jsonl"))
    losses, before = [], 0
    for row in rows:
        if row["kind"] == "step":
            losses += [row["parts"]["data"]] * (row["examples"] - before)
            before = row["examples"]
    # Tolerance: the records' losses are means in float32, ours in float64.
    expected = np.mean(losses[NUM_TRAIN:])
    assert result["figures"]["training loss"]["values"]["a"][0] == pytest.approx(expected, rel=1e-6)


def test_equal_recipes_differ_by_exactly_nothing():
    a, b = recipes()
    result = run_command("compare", a, b, "--seeds", 2, "--json").report
    for title in FIGURES:
        paired = result["figures"][title]["minus a"]["b"]
        assert [paired[key] for key in ("mean", "spread", "low", "high")] == [0, 0, 0, 0]
    assert result["training_loss_from"] == 0  # a single epoch: nothing is left out
    runs = result["runs"]
    assert digest(runs[0]) == digest(runs[1])
    assert digest(runs[0]) != digest(runs[2])  # the control: another seed


def test_reductions_and_penalties_are_compared_by_the_same_mean_loss():
    """Sum at lr / B is Mean at lr; what a penalty adds to the loss is left out of the figure.

    Tolerance: float32 over 5 updates; batches of 1,438 // 5 examples, so that all are equal.
    """
    strength = [{"kind": "L2", "strength": 0.0}]
    size = {"size": 287, "last": "drop"}
    write_recipe(Path(), batch=size).rename("mean.toml")
    halved = {"name": "sgd", "lr": 0.5 / 287}
    total = {"loss": "cross_entropy", "reduction": "sum", "penalty": strength}
    write_recipe(Path(), batch=size, optimizer=halved, objective=total).rename("sum.toml")
    result = run_command("compare", "mean.toml", "sum.toml", "--seeds", 2, "--json").report
    for title in FIGURES[:2]:
        values = result["figures"][title]["values"]
        assert values["mean"] == pytest.approx(values["sum"], rel=1e-5)
    raw = [read_records(Path(run, "records.jsonl"))[1]["loss"] for run in result["runs"][:2]]
    assert raw[1] == pytest.approx(287 * raw[0], rel=1e-5)  # the control


@pytest.mark.slow
def test_more_seeds_make_only_the_runs_that_are_not_there():
    a, b = recipes()
    first = run_command("compare", a, b, "--seeds", 2, "--json").report
    messages = run_command("compare", a, b, "--seeds", 3).out
    assert "4 of 6 runs are done already" in messages
    assert messages.count("held out: loss") == 2
    more = run_command("compare", a, b, "--seeds", 3, "--json").report
    assert more["folder"] == first["folder"]
    for title in FIGURES:
        for name in "ab":
            values = [result["figures"][title]["values"][name] for result in (first, more)]
            assert values[1][:2] == values[0]
    for run in more["runs"]:
        sessions = [row for row in read_records(Path(run, "records.jsonl")) if "torch" in row]
        assert len(sessions) == 1


@pytest.mark.slow
def test_a_run_that_was_gone_on_with_elsewhere_is_to_be_made_again():
    call = ("compare", *recipes(), "--seeds", 2, "--out", "cut")
    run = Path(run_command(*call, "--json").report["runs"][0])
    (run / "outcome.json").unlink()
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    rest = [line for line in lines if '"comparison"' not in line or '"step": 5' not in line]
    (run / "records.jsonl").write_text("".join(rest))
    ended = anybatch(*call)
    assert ended.code == 2
    assert "has made 6 updates, but only 5 of them in a comparison" in ended.err
    shutil.rmtree(run)
    assert "3 of 4 runs are done already" in run_command(*call).out


@pytest.mark.slow
def test_another_recipe_makes_another_comparison():
    a, b = recipes()
    one = run_command("compare", a, b, "--seeds", 2, "--json").report["folder"]
    write_recipe(Path(), optimizer={"lr": 0.25}).rename("b.toml")
    message = refuse("compare", a, b, "--seeds", 2, "--out", one)
    assert f"{one} exists and is no comparison of these recipes" in message
    two = run_command("compare", a, b, "--seeds", 2, "--json").report["folder"]
    assert (one, two) == ("runs/compare-a-b-1", "runs/compare-a-b-2")


FAILING = """
import os, signal
from pathlib import Path
from anybatch.zoo import cross_entropy

def fails(model, batch):
    if model.training and list(Path("runs").rglob("b/seed-1")):
        raise RuntimeError("seed 1 is there")
    return cross_entropy(model, batch)

def dies(model, batch):
    if model.training:
        os.kill(os.getpid(), signal.SIGKILL)
    return cross_entropy(model, batch)
"""


@pytest.mark.slow
def test_a_run_that_fails_is_told_of_and_the_others_finish():
    write_module(Path.cwd(), "failing", FAILING)
    a, b = recipes(objective={"loss": "failing:fails"})
    ended = anybatch("compare", a, b, "--seeds", 2, "--jobs", 1, "--json")
    assert ended.code == 2
    assert "anybatch: b seed 1 failed: RuntimeError: seed 1 is there\n" in ended.err
    assert "in your own code at" in ended.err
    assert "Traceback" not in ended.err
    assert len(ended.report["failed"]) == 1
    assert ended.report["figures"]["training loss"]["seeds"] == {"a": [0, 1], "b": [0]}
    assert ended.report["figures"]["training loss"]["minus a"]["b"]["pairs"] == 1
    Path("failing.py").write_text(FAILING.replace("raise RuntimeError", "print"))
    again = run_command("compare", a, b, "--seeds", 2, "--jobs", 1, "--json").report
    assert again["figures"]["training loss"]["seeds"] == {"a": [0, 1], "b": [0, 1]}


def test_what_a_recipe_is_warned_of_is_told_once_and_not_for_each_seed():
    a, b = recipes(batch={"size": 256, "reference_size": 128})
    ended = anybatch("compare", a, b, "--seeds", 3, "--json")
    assert ended.code == 0
    assert ended.err.count("anybatch: b: rescaled from batch.reference_size = 128") == 1
    assert "anybatch: a:" not in ended.err


def test_a_process_that_dies_takes_no_other_run_with_it():
    write_module(Path.cwd(), "failing", FAILING)
    a, b = recipes(objective={"loss": "failing:dies"})
    ended = anybatch("compare", a, b, "--seeds", 2, "--jobs", 1, "--json")
    assert ended.code == 2
    assert ended.err.count("its process has died (signal 9)") == 2
    assert ended.report["figures"]["training loss"]["seeds"] == {"a": [0, 1], "b": []}


def test_mistakes_are_found_before_there_is_a_folder():
    a, b = recipes(data={"name": "digits", "split": 1})
    assert "there is nothing to compare a.toml with" in refuse("compare", a)
    message = refuse("compare", a, b)
    assert "data.split is 0 in a and 1 in b. Only runs on the same" in message
    assert "there is no recipe 'nowhere.toml'" in refuse("compare", a, "nowhere.toml")
    key = refuse("compare", a, a, "--set", "optimizer.rate=1")
    assert "optimizer.rate: no such key" in key
    misfit = refuse("compare", a, a, "--set", "model.name=lenet")
    assert "model" in misfit
    Path("taken").mkdir()
    assert "taken exists and is no comparison" in refuse("compare", a, a, "--out", "taken")
    Path("page.html").touch()
    page = refuse("compare", a, a, "--html", "page.html")
    assert "page.html exists and is not written over" in page
    assert "none is no folder" in refuse("compare", a, a, "--html", "none/page.html")
    assert not Path("runs").exists()


def test_a_page_without_plotly_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    a, b = recipes()
    message = refuse("compare", a, b, "--html", "page.html")
    assert "made by plotly, which cannot be imported" in message
    assert "Install it: pip install 'anybatch[report]'" in message
    assert not Path("runs").exists()


def test_the_page_needs_nothing_else_and_names_are_no_markup():
    name = "<img src=x onerror=alert(1)>&"
    write_recipe(Path()).rename(f"{name}.toml")
    a, b = recipes()
    run_command("compare", f"{name}.toml", a, b, "--seeds", 2, "--html", "page.html", "--json")
    page = Path("page.html").read_text()
    beginning = page.index("</script>")  # of the library, which itself speaks of addresses
    outside = page[: page.index("<script>")] + page[beginning:]
    assert "<img" not in outside
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in outside
    loads = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)\s*=|@import|url\(")
    assert loads.search(outside) is None
    assert loads.search('<script src="https://cdn.plot.ly/plotly.js">') is not None  # control
    assert outside.count("Plotly.newPlot") == 2


def test_names_of_the_same_file_are_told_apart_and_the_seeds_are_those_of_the_first():
    first = recipe(**{"run.seed": 7})
    entries = make_entries([(first, "a", False), (recipe(), "a", False), (recipe(), "a", False)])
    assert [entry.name for entry in entries] == ["a", "a-2", "a-3"]
    trials = list_trials(entries[:2], Path("there"), 2)
    assert [(t.name, t.seed) for t in trials] == [("a", 7), ("a-2", 7), ("a", 8), ("a-2", 8)]
    assert {trial.recipe.run.threads for trial in trials} == {1}


def test_runs_side_by_side_are_those_one_after_the_other():
    plain = recipe(**{"run.threads": 1})
    for jobs, folder in ((1, "one"), (2, "two")):
        trials = list_trials(make_entries([(plain, "a", False)]), Path(folder), 2)
        ended = [
            e for e in train_side_by_side(trials, jobs, describe_error) if isinstance(e, Ended)
        ]
        assert sorted(e.trial.seed for e in ended) == [0, 1]
    for seed in (0, 1):
        assert digest(f"one/a/seed-{seed}") == digest(f"two/a/seed-{seed}")
        curves = [read_curve(Path(folder, "a", f"seed-{seed}"), 6) for folder in ("one", "two")]
        assert curves[0] == curves[1]


def test_the_json_names_no_number_that_json_does_not_know():
    a, b = recipes()
    text = run_command("compare", a, b, "--seeds", 2, "--json").out
    assert json.loads(text, parse_constant=pytest.fail)["window"] == 256


def test_a_chart_has_each_curve_at_its_height():
    rows = draw_chart({"down": [4.0, 3.0, 2.0, 1.0], "flat": [1.0] * 4}, ("0", "3"), width=4)
    assert rows[0].endswith("|A   ")
    assert rows[13].endswith("|BBB*")
    assert rows[-2].split() == ["0", "3"]
    assert rows[-1] == "A down   B flat"
    assert draw_chart({"wide": [1.0, 100.0]}, ("0", "1"))[-1].endswith("(logarithmic)")
    assert len(draw_chart({"one": [1.0]}, ("0", "1"))) == 17
