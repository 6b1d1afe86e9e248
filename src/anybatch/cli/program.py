"""Name of the program as the user can type it, for commands that messages suggest."""

import os
import shutil
import sys
from pathlib import Path

__all__ = ["name_program"]


def name_program() -> str:
    """Return `anybatch` where a shell finds this installation by that name, else a path to it.

    In a virtual environment that is not activated it is a path such as `.venv/bin/anybatch`.
    """
    script = Path(sys.executable).with_name("anybatch")
    if not script.exists():  # run from a source tree
        return f"{_short(Path(sys.executable))} -m anybatch"
    on_path = shutil.which("anybatch")
    is_found = on_path is not None and Path(on_path).parent.samefile(script.parent)
    return "anybatch" if is_found else _short(script)


def _short(path: Path) -> str:
    """Write a path from the current folder where it lies below it."""
    here = Path(os.path.abspath("."))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
