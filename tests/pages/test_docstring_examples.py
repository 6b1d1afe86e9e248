"""Examples in docstrings run as printed."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import anybatch

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NOT_IMPORTED = ("anybatch.__main__",)


def find_examples() -> list[doctest.DocTest]:
    """Collect the examples of every module of the package."""
    names = [module.name for module in pkgutil.walk_packages(anybatch.__path__, "anybatch.")]
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        test
        for name in names
        if name not in NOT_IMPORTED
        for test in finder.find(importlib.import_module(name), name)
        if test.examples
    ]


EXAMPLES = find_examples()


def run_example(test: doctest.DocTest) -> str:
    """Run an example, and return what went wrong; nothing if it printed what it says."""
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_an_example_prints_what_it_says(
    test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_example(test) == ""


@pytest.mark.parametrize("name", anybatch.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    docstring = getattr(anybatch, name).__doc__ or ""
    assert ">>> " in docstring, f"anybatch.{name} has no example"


def test_a_wrong_example_is_found() -> None:  # the control
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "sum", None, 0)
    assert "Expected:\n    3\nGot:\n    2" in run_example(test)
