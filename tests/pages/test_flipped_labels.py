"""docs/flipped-labels.md against its raw result, and the labels that it flips."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield benchmarks/flipped_labels.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("flipped_labels")
    for name in ("flipped_labels", "machine", "tables"):
        sys.modules.pop(name)


def test_the_table_is_that_of_the_raw_result(load_benchmark: Any) -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "flipped_labels.json").read_text())["runs"]
    document = (ROOT / "docs" / "flipped-labels.md").read_text(encoding="utf8")
    fill = import_module("tables").fill_tables
    assert fill(document, {"flips": load_benchmark.format_runs(runs)}) == document
    runs[0]["norm"] -= 1  # control
    assert fill(document, {"flips": load_benchmark.format_runs(runs)}) != document


def test_a_tenth_of_the_labels_becomes_another_class(load_benchmark: Any) -> None:
    targets = torch.arange(500) % 10
    changed, wrong = load_benchmark.flip_labels(targets, seed=3)
    assert set((changed != targets).nonzero()[:, 0].tolist()) == wrong
    assert len(wrong) == 50
    assert changed.min() >= 0
    assert changed.max() <= 9
    assert load_benchmark.flip_labels(targets, seed=4)[1] != wrong
