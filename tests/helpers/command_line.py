"""Commands called in this process, and a recipe small enough to train in a tenth of a second."""

import copy
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from anybatch.cli import main
from anybatch.recipe.files import parse_recipe
from anybatch.recipe.schema import Recipe

NUM_TRAIN, NUM_HELD_OUT = 1438, 359  # of the 1,797 digits, a fifth of each class held out
STEPS_AN_EPOCH = 6  # ceil(1438 / 256)

RECIPE: dict[str, dict[str, Any]] = {
    "model": {"name": "softmax_regression"},
    "data": {"name": "digits"},
    "objective": {"loss": "cross_entropy"},
    "optimizer": {"name": "sgd", "lr": 0.5},
    "batch": {"size": 256},
    "run": {"epochs": 1, "threads": 1},
}


class Terminal(StringIO):
    """Text file that rich takes for a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Ended:
    """End of a command."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """Output of the command with --json."""
        return json.loads(self.out, parse_constant=_refuse)


def anybatch(*arguments: object) -> Ended:
    """Call the command line; a traceback would be raised here."""
    out, err = StringIO(), StringIO()
    code = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), f"ended with {code!r}"
    return Ended(code, out.getvalue(), err.getvalue())


def run_command(*arguments: object) -> Ended:
    """Call the command line, and see that it succeeds without a word on stderr."""
    ended = anybatch(*arguments)
    assert (ended.code, ended.err) == (0, "")
    return ended


def refuse(*arguments: object) -> str:
    """Call the command line, and see that it ends with one message; the message."""
    ended = anybatch(*arguments)
    assert ended.code == 2
    assert ended.err.startswith("anybatch: ")
    assert ended.err.count("anybatch: ") == 1
    assert "Traceback" not in ended.err
    return ended.err


def recipe(**keys: Any) -> Recipe:
    """Return the small recipe with keys changed, "section.key" by value."""
    return parse_recipe(tree(**keys), "a test")


def tree(**keys: Any) -> dict[str, Any]:
    """Return the small recipe as nested dicts."""
    result = copy.deepcopy(RECIPE)
    for key, value in keys.items():
        section, _, name = key.partition(".")
        result.setdefault(section, {})[name] = value
    return result


def write_recipe(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """Return the small recipe with some keys changed; None leaves a key out."""
    lines = []
    for name in RECIPE | sections:
        lines.append(f"[{name}]")
        keys = RECIPE.get(name, {}) | sections.get(name, {})
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value is not None]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_module(folder: Path, name: str, text: str) -> None:
    """A module of the user's in the folder that the command is called from."""
    folder.joinpath(f"{name}.py").write_text(text)
    assert Path(os.getcwd()) == folder, "modules are found from the working folder"


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
