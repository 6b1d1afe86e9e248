"""Print results: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, ProgressColumn
from rich.segment import Segment
from rich.table import Table

from anybatch.cli.output import print_text, wrap_text
from anybatch.displays import format_number
from anybatch.limits import escape_controls, replace_non_finite

if TYPE_CHECKING:
    from anybatch.advice.plots import Band
    from anybatch.questions import Answer, WrongIdea

__all__ = [
    "console",
    "format_json",
    "make_progress",
    "print_answers",
    "print_chart",
    "print_result",
    "print_table",
    "print_wrapped",
    "print_wrong_ideas",
]


class _Console(Console):
    """Console on which no text can move the cursor or change a colour."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the segments of what is printed, with control characters as escapes."""
        for one in super().render(renderable, options):
            yield one if one.control else one._replace(text=escape_controls(one.text))


console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: a JSON object, or one line for each value."""
    if as_json:
        print_text(format_json(result))
        return
    width = max(map(len, result))
    for name, value in result.items():
        first, *rest = wrap_text(_format_value(value), sys.stdout, margin=width + 2).split("\n")
        print_text(f"{name.replace('_', ' '):<{width}}  {first}")
        for line in rest:
            print_text(f"{' ' * width}  {line}")


def print_wrapped(*texts: str) -> None:
    """Print lines, broken between words to the width of the terminal."""
    for text in texts:
        console.print(wrap_text(text, console.file))


def print_chart(bands: Mapping[str, "Band"], ends: tuple[str, str]) -> None:
    """Print the curves of bands as a chart of characters; `ends` are those of its axis."""
    from anybatch.advice.plots import draw_chart

    for line in draw_chart({name: band.middle for name, band in bands.items()}, ends):
        console.print(line)
    console.print()


def print_answers(answers: Iterable["Answer"]) -> None:
    """Print each question with its answer and the figures that were measured for it."""
    for number, answer in enumerate(answers, 1):
        print_text(fill(f"{number}. {answer.question}", 79, subsequent_indent="   "))
        print_text(fill(answer.answer, 79, initial_indent="   ", subsequent_indent="   "))
        for line in answer.lines:
            print_text(f"     {line}")
        print_text()


def print_wrong_ideas(ideas: Iterable["WrongIdea"]) -> None:
    """Print the right gradient and each wrong idea in a line: distance, cosine and loss."""
    print_text("Six wrong ideas of a batch's gradient, on a small network that reads digits.")
    print_text("Distance and cosine are to the right gradient; loss is after 100 updates.\n")
    print_text(f"     {'':27s}  distance  cosine   loss")
    for idea in ideas:
        figures = f"{idea.distance:8.3f}  {idea.cosine:6.3f}  {idea.loss:5.2f}"
        print_text(f"     {idea.name:27s}  {figures}")
    print_text()


def print_table(rows: Sequence[Mapping[str, Any]], *, list_if_wide: bool = False) -> None:
    """Print a table with a column for each key.

    Args:
        rows: their values, in the order of the columns.
        list_if_wide: whether to print a list in place of a table wider than the terminal. A table
            would break the names of its columns in the middle.
    """
    if list_if_wide and rows and _measure_table(rows) > console.width:
        _print_list(rows)
        return
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_format_value(value) for value in row.values()))
    console.print(table, soft_wrap=False)


def _measure_table(rows: Sequence[Mapping[str, Any]]) -> int:
    """Compute the width of a table in which no cell is wrapped."""
    texts = [[name, *(_format_value(row[name]) for row in rows)] for name in rows[0]]
    return sum(max(map(cell_len, column)) + 3 for column in texts) + 1


def _print_list(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print each row as lines: its first value, then the others with their names."""
    for row in rows:
        (_, first), *others = row.items()
        print_text(_format_value(first))
        for name, value in others:
            lines = wrap_text(f"{name}: {_format_value(value)}", console.file, margin=2)
            for line in lines.split("\n"):
                print_text(f"  {line}")


def make_progress(terminal: Console, *columns: ProgressColumn, quiet: bool) -> Progress:
    """Make progress bars that disappear in the end. They are shown only on a terminal."""
    # FORCE_COLOR makes rich take a log for a terminal; bars have no place in a log.
    is_shown = terminal.is_interactive and terminal.file.isatty() and not quiet
    return Progress(*columns, console=terminal, transient=True, disable=not is_shown)


def format_json(value: Any) -> str:
    """Format JSON on one line, with null for numbers that are not finite."""
    return json.dumps(replace_non_finite(value), allow_nan=False)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Mapping):
        return "  ".join(
            f"{str(name).replace('_', ' ')} {_format_value(inner)}" for name, inner in value.items()
        )
    if isinstance(value, list):
        return "\n".join(_format_value(inner) for inner in value) or "none"
    return "none" if value is None else str(value)
