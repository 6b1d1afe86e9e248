"""What the commands print: tables for people, JSON for programs."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from anybatch.cli.output import say
from anybatch.cli.wrapping import wrap
from anybatch.limits import escape_controls

if TYPE_CHECKING:
    from anybatch.questions import Answer

__all__ = ["as_line", "console", "number", "show", "show_answers", "show_rows"]


class _Console(Console):
    """A console on which no text can move the cursor or change a colour."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the parts of what is printed, control characters shown as escapes."""
        for part in super().render(renderable, options):
            yield part if part.control else part._replace(text=escape_controls(part.text))


console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def show(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: a JSON object, or a line a value."""
    if as_json:
        say(as_line(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        first, *rest = wrap(_text(value), sys.stdout, margin=width + 2).split("\n")
        say(f"{name.replace('_', ' '):<{width}}  {first}")
        for line in rest:
            say(f"{' ' * width}  {line}")


def show_answers(answers: Iterable["Answer"]) -> None:
    """Print each question with its answer and the figures that were measured for it."""
    for number_, answer in enumerate(answers, 1):
        say(fill(f"{number_}. {answer.question}", 79, subsequent_indent="   "))
        say(fill(answer.answer, 79, initial_indent="   ", subsequent_indent="   "))
        for line in answer.shown:
            say(f"     {line}")
        say()


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column a key."""
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table, soft_wrap=False)


def as_line(value: Any) -> str:
    """JSON on one line; null for numbers that are not finite, which JSON does not know."""
    return json.dumps(_finite(value), allow_nan=False)


def number(value: float) -> str:
    """A number in as few characters as say it."""
    return f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(_text(inner) for inner in value) or "none"
    return "none" if value is None else str(value)
