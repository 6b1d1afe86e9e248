"""What the commands print: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from anybatch.questions import Answer

__all__ = ["console", "number", "show", "show_answers"]

console = Console(highlight=False)


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: a JSON object, or a row a value."""
    if as_json:
        json.dump(found, sys.stdout)
        print()
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found.items():
        table.add_row(name.replace("_", " "), _text(value))
    console.print(table)


def show_answers(answers: Iterable["Answer"]) -> None:
    """The five questions, a row each."""
    table = Table(show_lines=True, expand=True)
    for title, ratio in (("question", 3), ("measured just now", 4), ("look further", 2)):
        table.add_column(title, ratio=ratio)
    for answer in answers:
        table.add_row(answer.question, answer.measured, answer.look)
    console.print(table)


def number(value: float) -> str:
    """A number in as few characters as say it."""
    return f"{value:.4g}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(_text(inner) for inner in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
