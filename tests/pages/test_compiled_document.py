"""Table of compiled updates in docs/performance.md against its raw result."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_raw_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark, fill = import_module("compiled"), import_module("tables").fill_tables
    for name in ("compiled", "loop", "machine", "tables"):
        sys.modules.pop(name)
    cases = json.loads((ROOT / "benchmarks/results/compiled.json").read_text())["cases"]
    document = (ROOT / "docs/performance.md").read_text(encoding="utf8")
    tables = {"compiled": benchmark.format_results(cases)}
    assert fill(document, tables, others=True) == document
    next(iter(cases.values()))["over_steps"] += 0.1  # control
    tables = {"compiled": benchmark.format_results(cases)}
    assert fill(document, tables, others=True) != document
