"""Packages that only a part of anybatch needs; most are extras of pyproject.toml."""

from importlib import import_module
from typing import Any

from anybatch.errors import AnybatchError

__all__ = ["needed", "needed_for_pages"]


def needed(module: str, install: str, what: str, error: type[AnybatchError]) -> Any:
    """A module of such a package.

    Args:
        module: its name, with dots.
        install: what pip is to install: an extra, such as "anybatch[data]", or a package.
        what: the clause that a message begins with, which ends in what is missing.
        error: which error it is where the module cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as missing:
        raise error(
            f"{what}, which cannot be imported: {missing}. Install it: pip install '{install}'."
        ) from missing


def needed_for_pages(module: str, error: type[AnybatchError]) -> Any:
    """A module that makes HTML."""
    return needed(module, "anybatch[report]", f"a page is made by {module.split('.')[0]}", error)
