"""Mutations of benchmarks/mutations.py by hand; draw and run of benchmarks/mutants.py."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = '''\
"""Sum 1 + 1."""

__all__ = ["add", "subtract"]


def add(a: "int | 3", b: int = 3) -> int:
    total = 0  # a + b
    if not (a) < b and True:
        raise ValueError(f"{a + b} is not 2 + 3")
    total += max(a, b)
    print(total)
    return (a  # first
            + b)
'''
MUTANTS = [
    ("constant", "3", "4"),
    ("constant", "0", "1"),
    ("boolean", " and ", " or "),
    ("boolean", "not (a) < b", "(a) < b"),
    ("comparison", ") < ", ") <= "),
    ("boolean", "True", "False"),
    ("statement", 'raise ValueError(f"{a + b} is not 2 + 3")', "pass"),
    ("arithmetic", " += ", " -= "),
    ("statement", "total += max(a, b)", "pass"),
    ("arguments", "a, b", "b, a"),
    ("statement", "print(total)", "pass"),
    ("arithmetic", "  # first\n            + ", "  # first\n            - "),
]


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Yield benchmarks/mutants.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("mutants")
    for name in ("mutants", "mutations", "machine"):
        sys.modules.pop(name)


def test_mutations_are_those_found_by_hand(mutants: ModuleType) -> None:
    source = SOURCE.encode()
    mutations = mutants.find_mutations(source)
    assert [(m.kind, m.before, m.after) for m in mutations] == MUTANTS
    for mutation in mutations:
        changed = mutation.apply(source)
        assert mutation.parses(source)
        assert changed.decode() == SOURCE.replace(mutation.before, mutation.after) or (
            len(changed) - len(source) == len(mutation.after) - len(mutation.before)
        )
        first = next(i for i, (a, b) in enumerate(zip(source, changed, strict=False)) if a != b)
        assert mutation.line == SOURCE[: mutation.start].count("\n") + 1
        assert mutation.start <= first < mutation.end + 1


def write_package(root: Path) -> None:
    package = root / "src" / "anybatch"
    (package / "large").mkdir(parents=True)
    (package / "__init__.py").write_text("NUMBER = 1\n")
    (package / "small.py").write_text("def half(a):\n    return a / 2\n")
    (package / "large" / "__init__.py").write_text("")
    (package / "large" / "sums.py").write_text(SOURCE)


def test_the_draw_depends_on_the_seed_and_reaches_every_subject(
    mutants: ModuleType, tmp_path: Path
) -> None:
    write_package(tmp_path)
    draws = [mutants.choose_mutants(5, seed, tmp_path) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        assert {mutant.subject for mutant in draw} == {"small", "large"}
        assert len(set(draw)) == len(draw) >= 5
    assert "__init__" not in mutants.list_modules(tmp_path)


def test_every_subject_of_the_package_has_tests(mutants: ModuleType) -> None:
    assert set(mutants.list_modules()) == set(mutants.SUBJECTS)
    for subject in mutants.SUBJECTS:
        assert mutants.select_tests(subject)
        for name in mutants.SUBJECTS[subject]:
            assert list((ROOT / "tests").rglob(f"test_{name}*.py")), f"no tests named {name}"


def test_the_document_states_the_record() -> None:
    record = json.loads((ROOT / "benchmarks/results/mutants.json").read_text())
    killed = sum(result["killed_by"] is not None for result in record["results"])
    text = " ".join((ROOT / "docs/architecture.md").read_text().split())
    assert f"the tests of each subject notice {killed} of {len(record['results'])} changes" in text
    assert record["arguments"]["tier"] == "subject"
    assert killed + len(record["survivors"]) == record["mutants"]


@pytest.mark.slow
def test_tests_end_at_the_first_failure_or_at_the_limit(
    mutants: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\n\n\ndef test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n\n\n"
        "def test_slow():\n    time.sleep(100)\n"
    )
    run = mutants.run_tests
    assert run(tmp_path, ["test_it.py"], 60) == (mutants.ENDED, "test_it.py::test_bad")
    assert run(tmp_path, ["test_it.py", "-k", "good"], 60) == (None, None)
    assert run(tmp_path, ["test_it.py", "-k", "slow"], 3) == (mutants.TIMED_OUT, None)
