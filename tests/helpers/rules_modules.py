"""Import benchmarks/rules again for each data set: its constants depend on the data."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"fashion_mnist": "scaling_rules", "digits": "scaling_rules_digits"}  # of raw results
BENCHMARKS = {"machine", "rules", "scaling_rules", "svg", "tables"}


class Modules:
    """Modules of benchmarks/rules as attributes."""

    def __getattr__(self, name: str) -> ModuleType:
        return import_module(f"rules.{name}")


def read_result(data: str) -> Any:
    """Read the raw result of a data set."""
    return json.loads((RESULTS / f"{NAMES[data]}.json").read_text())


def read_document(data: str) -> str:
    """Read the document of a data set."""
    return (DOCS / f"{NAMES[data].replace('_', '-')}.md").read_text(encoding="utf8")


@pytest.fixture
def load_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Modules]]:
    """Yield a function that imports the modules for a data set."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(data: str) -> Modules:
        forget_modules()
        monkeypatch.setenv("SCALING_RULES_DATA", data)
        return Modules()

    yield load
    forget_modules()


def forget_modules() -> None:
    """Remove the modules, so that the next import runs them again."""
    for name in [n for n in sys.modules if n.partition(".")[0] in BENCHMARKS]:
        sys.modules.pop(name)
