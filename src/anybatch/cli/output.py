"""Where all text for the terminal goes through: none of it can steer the terminal."""

import sys

from anybatch.cli.wrapping import wrap
from anybatch.limits import escape_controls

__all__ = ["say", "tell"]


def say(text: str = "", end: str = "\n") -> None:
    """Print text to stdout; control characters in it are shown as escapes."""
    print(escape_controls(text), end=end)


def tell(message: str) -> None:
    """Print one message to stderr."""
    print(wrap(f"anybatch: {escape_controls(message)}", sys.stderr), file=sys.stderr)
