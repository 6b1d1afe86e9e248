"""Where all text for the terminal goes through: none of it can steer the terminal."""

import shutil
import sys
import textwrap
from typing import IO

from anybatch.limits import printable

__all__ = ["print_error", "print_text", "wrap_text"]


def print_text(text: str = "", end: str = "\n") -> None:
    """Print text to stdout; control characters in it are shown as escapes."""
    print(printable(text), end=end)


def print_error(message: str) -> None:
    """Print one message to stderr."""
    print(wrap_text(f"anybatch: {printable(message)}", sys.stderr), file=sys.stderr)


def wrap_text(text: str, file: IO[str], *, margin: int = 0) -> str:
    """Break the lines of a text between words, as wide as the terminal that it is for.

    Args:
        text: the lines.
        file: where they are printed.
        margin: columns that something else takes on each line.
    """
    if not file.isatty():
        return text
    width = max(shutil.get_terminal_size().columns - margin, 20)
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def _wrap_line(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
