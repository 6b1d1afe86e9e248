"""Benchmark of the systems: its document against its raw results, and these against the recipes."""

import json
import sys
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import anybatch

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "systems.json"


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield benchmarks/systems.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("systems")
    for name in ("systems", "tables", "machine"):
        sys.modules.pop(name)


def test_the_tables_are_those_of_the_raw_results(systems: Any) -> None:
    result = json.loads(RESULT.read_text())
    document = (ROOT / "docs" / "systems.md").read_text(encoding="utf8")
    fill = import_module("tables").fill_tables
    assert fill(document, systems.format_tables(result)) == document
    result["systems"]["goyal"][0]["accuracy"] -= 0.01  # control
    assert fill(document, systems.format_tables(result)) != document
    for name in systems.SYSTEMS:  # each has a row in the table of the originals
        assert f"\n| {name} | " in document


def test_the_raw_results_are_of_three_seeds_of_every_present_recipe(systems: Any) -> None:
    results = json.loads(RESULT.read_text())["systems"]
    assert list(results) == list(systems.SYSTEMS)
    for name, runs in results.items():
        assert [run["seed"] for run in runs] == [0, 1, 2]
        assert {run["recipe_sha256"] for run in runs} == {systems.hash_recipe(name)}
        assert {run["anybatch"] for run in runs} == {"0.2.0" if name == "tf-cifar10" else "0.1.0"}
    assert systems.hash_recipe("dln-mlp") != systems.hash_recipe("dln-sum")  # control


def test_a_row_has_mean_and_deviation_in_per_cent(systems: Any) -> None:
    runs = [
        {"accuracy": value, "epochs": 2, "updates": 1000, "examples": 90_000, "cpu_seconds": 3.0}
        for value in (0.80, 0.81, 0.85)
    ]
    # by hand: mean 82, deviations -2, -1, 3, so sqrt(14 / 2) = 2.65; 270,000 examples in 9 s
    row = "| [ng](../recipes/ng.toml) | 82.00 ± 2.65 | 2 | 1,000 | 3 | 30,000 |"
    assert row in systems.format_runs({"ng": runs}).splitlines()
    runs[2] |= {"epochs": 4, "updates": 2000}
    assert "| 2 to 4 | 1,000 to 2,000 |" in systems.format_runs({"ng": runs})


def test_a_run_is_measured_as_the_command_line_trains_it(systems: Any) -> None:
    changes = ["run.epochs=20", "batch.last=keep"]
    runs = [systems.train_system("dln-logistic-digits", seed, changes) for seed in (0, 1)]
    for run in runs:
        assert (run["updates"], run["examples"], run["epochs"]) == (60, 20 * 1438, 20)
        assert 0.5 < run["accuracy"] < 1
        assert run["cpu_seconds"] > 0
        assert run["anybatch"] == anybatch.__version__
    assert runs[0]["loss"] != runs[1]["loss"]
    assert systems.train_system("dln-logistic-digits", 0, changes)["loss"] == runs[0]["loss"]
    assert mean(run["accuracy"] for run in runs) > 0.7
