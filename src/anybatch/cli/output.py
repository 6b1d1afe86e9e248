"""Print text such that it cannot control the terminal, with lines as wide as the terminal."""

import shutil
import sys
import textwrap
from typing import IO

from anybatch.limits import escape_controls

__all__ = ["print_error", "print_text", "wrap_text"]


def print_text(text: str = "", end: str = "\n") -> None:
    """Print text to stdout, with control characters as escapes."""
    print(escape_controls(text), end=end)


def print_error(message: str) -> None:
    """Print one message to stderr, with control characters as escapes."""
    print(wrap_text(f"anybatch: {escape_controls(message)}", sys.stderr), file=sys.stderr)


def wrap_text(text: str, file: IO[str], *, margin: int = 0) -> str:
    """Break lines between words, to the width of the terminal; not for a file or a pipe.

    Args:
        file: where they are printed.
        margin: columns of each line that are taken.
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
