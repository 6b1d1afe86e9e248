"""Sentences wrapped between words on a terminal; left alone in a file or a pipe."""

import shutil
import textwrap
from typing import IO

__all__ = ["wrap"]


def wrap(text: str, file: IO[str]) -> str:
    """Break the lines of a text between words, as wide as the terminal that it is for."""
    if not file.isatty():
        return text
    width = shutil.get_terminal_size().columns
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
