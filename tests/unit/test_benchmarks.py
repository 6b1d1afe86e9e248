"""Benchmarks import what the package has, and say how to run them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


def list_attributes(path: Path) -> list[str]:
    """List the names of anybatch that a file imports or reads from an imported module."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    modules, names = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anybatch"):
            for alias in node.names:
                names.append(f"{node.module}:{alias.name}")
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "anybatch":
                    modules[alias.asname or alias.name] = "anybatch"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in modules:
                names.append(f"{modules[name]}:{attribute}")
            case ast.Call(
                func=ast.Attribute(attr="object"),
                args=[ast.Name(id=name), ast.Constant(value=attribute), *_],
            ) if name in modules:  # mock.patch.object
                names.append(f"{modules[name]}:{attribute}")
    return names


CHECK = """
import sys
from importlib import import_module
from pkgutil import resolve_name

for name in sys.argv[1:]:
    try:
        resolve_name(name)
    except AttributeError as error:
        print(name, error)
    except ImportError as error:  # of a class or function, whose attributes are not modules
        owner, _, attribute = name.rpartition(":")
        try:
            getattr(resolve_name(":".join(owner.rsplit(".", 1))), attribute)
        except (AttributeError, ImportError) as error:
            print(name, error)
"""


def find_missing(names: list[str]) -> list[str]:
    """Return the names that the package does not have, in a process without other modules."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.run(
        [sys.executable, "-c", CHECK, *sorted(set(names))],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return process.stdout.splitlines()


@pytest.mark.slow
def test_every_name_of_the_package_in_a_benchmark_exists() -> None:
    names = [name for path in FILES for name in list_attributes(path)]
    assert "anybatch.gradient:batch_gradient" in names
    assert "anybatch:steps" in names
    assert find_missing(names) == []


@pytest.mark.slow
def test_a_name_that_does_not_exist_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "import anybatch as ab\nfrom anybatch import layout\nfrom anybatch.layout import Layout\n"
        "ab.steps, ab.stairs, layout.Layout, layout.Lay, Layout.mro, Layout.moro\n"
        "from unittest import mock\nmock.patch.object(Layout, 'mono', 1)\n"
    )
    missing = [line.split()[0] for line in find_missing(list_attributes(path))]
    assert missing == [
        *("anybatch.layout.Layout:mono", "anybatch.layout.Layout:moro"),
        *("anybatch.layout:Lay", "anybatch:stairs"),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_command_says_in_its_docstring_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    if '__name__ == "__main__"' in text:
        name = path.relative_to(ROOT)
        assert f"python {name}" in (ast.get_docstring(ast.parse(text)) or "")
