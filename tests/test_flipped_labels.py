"""docs/flipped-labels.md is what its raw result gives, and what is flipped is what it says."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def flipped_labels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/flipped_labels.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("flipped_labels")
    for name in ("flipped_labels", "machine"):
        sys.modules.pop(name)


def test_the_document_is_what_the_raw_result_gives(flipped_labels: Any) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "flipped_labels.json").read_text())
    document = (ROOT / "docs" / "flipped-labels.md").read_text(encoding="utf8")
    assert document == flipped_labels.text_of(result)
    result["runs"][0]["norm"] -= 1  # the control
    assert document != flipped_labels.text_of(result)


def test_a_tenth_of_the_labels_becomes_another_class(flipped_labels: Any) -> None:
    targets = torch.arange(500) % 10
    changed, wrong = flipped_labels.flipped(targets, seed=3)
    assert set((changed != targets).nonzero()[:, 0].tolist()) == wrong
    assert len(wrong) == 50
    assert changed.min() >= 0
    assert changed.max() <= 9
    assert flipped_labels.flipped(targets, seed=4)[1] != wrong
