"""Paths are those of local files: an address of the net is refused by name, never made a folder."""

import os
import re
from os import PathLike, fspath
from pathlib import Path

from anybatch.errors import AnybatchError

__all__ = ["check_local", "scheme_of", "user_folder"]

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # of two letters on: C:/ is a drive


def scheme_of(path: object) -> str | None:
    """Find the scheme of a URL, such as "s3"; None: it is none.

    A URL that has gone through `pathlib.Path`, which makes one slash of two, is still one.

    Examples:
        >>> scheme_of("s3://bucket/rows.csv"), scheme_of("runs/s3"), scheme_of("C:/runs")
        ('s3', None, None)
    """
    if not isinstance(path, str | PathLike):
        return None
    text = fspath(path)
    found = SCHEME.match(text) if isinstance(text, str) else None
    return None if found is None else found[1].lower()


def check_local(path: object, place: str, error: type[AnybatchError]) -> None:
    """See that a path is no URL.

    Args:
        path: what is to be checked; anything that is no path passes.
        place: where it was given, such as "--out" or "data.args.path", for the message.
        error: the kind of error to raise.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return
    text = re.sub(r":/+", ":///" if scheme == "file" else "://", str(path), count=1)
    advice = "Copy the files to this machine first, or mount the storage as a folder."
    if scheme == "file":
        advice = "Give the path alone, without file://."
    raise error(
        f"{place}: {text} is a URL, and {scheme}:// is not supported, only local paths are. "
        f"{advice}"
    )


def user_folder(variable: str, default: str) -> Path | None:
    """Return anybatch's own folder among the user's files.

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
