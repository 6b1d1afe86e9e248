"""Import packages that only a part of anybatch needs; most are extras of pyproject.toml."""

from importlib import import_module
from typing import Any

from anybatch.errors import AnybatchError

__all__ = ["import_extra", "import_for_pages"]


def import_extra(module: str, install: str, purpose: str, error: type[AnybatchError]) -> Any:
    """Import a module of an optional package.

    Args:
        module: its full name.
        install: what pip is to install: an extra, such as "anybatch[data]", or a package.
        purpose: the clause that a message begins with; it ends with the name of the package.
        error: class of the error if the module cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as cause:
        raise error(
            f"{purpose}, which cannot be imported: {cause}. Install it: pip install '{install}'."
        ) from cause


def import_for_pages(module: str, error: type[AnybatchError]) -> Any:
    """Import a module that HTML pages need."""
    purpose = f"a page is made by {module.split('.')[0]}"
    return import_extra(module, "anybatch[report]", purpose, error)
