"""Sentences wrapped between words on a terminal; left alone in a file or a pipe."""

import shutil
import textwrap
from typing import IO

__all__ = ["wrap"]


def wrap(text: str, file: IO[str], *, margin: int = 0) -> str:
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
