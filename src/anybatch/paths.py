"""Check that paths are local: a URL is refused by name, never created as a folder."""

import os
import re
from os import PathLike, fspath
from pathlib import Path

from anybatch.errors import AnybatchError

__all__ = ["check_local", "find_scheme", "find_user_folder"]

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # at least two letters: C:/ is a drive


def find_scheme(path: object) -> str | None:
    """Find the scheme of a URL, such as "s3"; None: it is no URL.

    `pathlib.Path` replaces two slashes by one; such a URL is recognised too.

    Examples:
        >>> find_scheme("s3://bucket/rows.csv"), find_scheme("runs/s3"), find_scheme("C:/runs")
        ('s3', None, None)
    """
    if not isinstance(path, str | PathLike):
        return None
    text = fspath(path)
    match = SCHEME.match(text) if isinstance(text, str) else None
    return None if match is None else match[1].lower()


def check_local(path: object, place: str, error: type[AnybatchError]) -> None:
    """Check that a path is no URL.

    Args:
        path: any object; one that is no path passes.
        place: origin of the path, such as "--out" or "data.args.path", for the message.
        error: class of the error to raise.
    """
    scheme = find_scheme(path)
    if scheme is None:
        return
    text = re.sub(r":/+", ":///" if scheme == "file" else "://", str(path), count=1)
    advice = "Copy the files to this machine first, or mount the storage as a folder."
    if scheme == "file":
        advice = "Give the path alone, without file://."
    raise error(
        f"{place}: {text} is a URL, and {scheme}:// is not supported. Only local paths are. "
        f"{advice}"
    )


def find_user_folder(variable: str, default: str) -> Path | None:
    """Find the folder of anybatch among the user's files.

    A relative path in the variable is ignored, as the XDG specification asks: it would lead into
    whatever folder the user is in, which may be a stranger's.

    Args:
        variable: names the parent folder, such as "XDG_CACHE_HOME".
        default: the parent folder below the user's home, where the variable names none.

    Returns:
        The folder; None for a user without a home.
    """
    parent = Path(os.environ.get(variable, ""))
    if not parent.is_absolute():
        try:
            parent = Path.home() / default
        except RuntimeError:
            return None
    return parent / "anybatch"
