"""Rules of the house, read off the source: short modules and functions, tests that can fail."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file
    for folder in ("src", "tests", "examples", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)
MODULE_LINES, FUNCTION_LINES = 400, 40
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of a module."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def num_lines(function: Function) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    doc = ast.get_docstring(function, clean=False)
    return lines - (doc.count("\n") + 1 if doc else 0)


def asserting(tree: ast.Module) -> set[str]:
    """Names of the functions of a module that can fail by an assertion, helpers included."""
    bodies = {function.name: function for function in functions(tree)}
    result: set[str] = set()
    while True:
        more = {
            name
            for name, body in bodies.items()
            if name not in result
            and (
                any(isinstance(node, ast.Assert) for node in ast.walk(body))
                or any(_asserts(called, result) for called, _ in calls(body))
            )
        }
        if not more:
            return result
        result |= more


def _asserts(called: str, helpers: set[str]) -> bool:
    last = called.rpartition(".")[2]
    return last in helpers or last.startswith(("assert", "raises", "warns", "fail"))


def mistakes(file: Path, text: str) -> list[str]:
    """Return what a module does against the rules."""
    tree = ast.parse(text)
    result = []
    if text.count("\n") > MODULE_LINES:
        result.append(f"{file}: more than {MODULE_LINES} lines")
    for function in functions(tree):
        if num_lines(function) > FUNCTION_LINES:
            result.append(f"{file}:{function.lineno}: {function.name} is too long")
    if file.name.startswith("test_"):
        can_fail = asserting(tree)
        result += [
            f"{file}:{function.lineno}: {function.name} asserts nothing"
            for function in functions(tree)
            if function.name.startswith("test_") and function.name not in can_fail
        ]
    for called, call in calls(tree):
        if called.endswith("pytest.raises") and "match" not in {k.arg for k in call.keywords}:
            result.append(f"{file}:{call.lineno}: pytest.raises without match")
    return result


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_rules_of_the_house_are_kept(file: Path) -> None:
    assert mistakes(file, file.read_text(encoding="utf8")) == []


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("x = 1\n" * 401, "more than 400 lines"),
        ("def f():\n" + "    x = 1\n" * 40, "f is too long"),
        ("def test_x():\n    print(1)\n", "test_x asserts nothing"),
        ("with pytest.raises(ValueError):\n    f()\n", "pytest.raises without match"),
        ("def help():\n    print(1)\ndef test_x():\n    help()\n", "test_x asserts nothing"),
    ],
)
def test_each_mistake_is_found(text: str, mistake: str) -> None:  # the control
    result = mistakes(Path("test_it.py"), text)
    assert len(result) == 1
    assert result[0].endswith(mistake)


def test_a_docstring_does_not_count_and_a_helper_that_asserts_does() -> None:
    long = 'def f():\n    """One\n' + "    line\n" * 50 + '    """\n'
    assert mistakes(Path("test_it.py"), long) == []
    helped = "def holds(x):\n    assert x\ndef test_x():\n    holds(1)\n"
    assert mistakes(Path("test_it.py"), helped) == []
