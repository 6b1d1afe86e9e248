"""docs/similar.md against its raw result, and the examples that it plants."""

import json
import sys
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "similar.md"
WITHOUT = ("without_opposed", "without_chance")


@pytest.fixture
def similar(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield benchmarks/similar.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("similar")
    for name in ("similar", "machine", "tables", "observed_models", "observed_step"):
        sys.modules.pop(name, None)
    sys.modules.pop("observed_peers", None)


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "similar.json").read_text())


def test_the_tables_are_those_of_the_raw_result(similar: Any, result: dict[str, Any]) -> None:
    document = DOCUMENT.read_text(encoding="utf8")
    fill = import_module("tables").fill_tables
    assert fill(document, similar.format_all(result)) == document
    result["wrong"][0]["loss"] += 1  # control
    assert fill(document, similar.format_all(result)) != document


def test_opposed_digits_have_the_predicted_label_and_pull_that_way(result: dict[str, Any]) -> None:
    rows = result["wrong"]
    assert len(rows) >= 10
    less = sum(row["without_opposed"] < row["without_chance"] for row in rows)
    text = f"In {less} of {len(rows)} trainings the loss is smaller without the most opposed"
    assert text in DOCUMENT.read_text(encoding="utf8")
    assert f"in the other {len(rows) - less} chance did more" in DOCUMENT.read_text(encoding="utf8")
    middle = {name: median(row[name] for row in rows) for name in ("loss", *WITHOUT)}
    assert middle["without_opposed"] < 0.8 * middle["without_chance"]
    assert median(row["opposed"].count(row["predicted"]) for row in rows) >= 15
    assert median(row["opposed"].count(row["target"]) for row in rows) == 0  # the control


def test_planted_examples_are_found(result: dict[str, Any]) -> None:
    for run in result["planted"]:
        for kind in ("duplicates", "labels"):
            assert len(run[kind]) == 20
            assert run[kind].count(1) >= 15


def test_twins_are_copies_and_wrong_labels_are_wrong(similar: Any, tmp_path: Path) -> None:
    twins, copied = similar.plant(3, tmp_path)
    train, contents = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("train", "held"))
    n, num_train = similar.PLANTED, similar.NUM_TRAIN
    assert len(train["inputs"]) == num_train + 2 * n
    assert np.array_equal(train["inputs"][num_train : num_train + n], train["inputs"][twins])
    assert np.array_equal(train["targets"][num_train : num_train + n], train["targets"][twins])
    places = np.array(copied) - len(train["inputs"])
    assert np.array_equal(train["inputs"][num_train + n :], contents["inputs"][places])
    assert (train["targets"][num_train + n :] != contents["targets"][places]).all()
    assert similar.plant(4, tmp_path)[0] != twins
