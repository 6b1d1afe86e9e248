"""Files that are there whole or not at all, even after a power cut.

write and fsync under another name -> rename -> fsync the folder
"""

import os
from collections.abc import Iterable
from pathlib import Path

from anybatch.errors import RunError
from anybatch.paths import check_local

__all__ = ["make_folder", "replace_file", "sync_folder"]


def replace_file(path: Path, pieces: Iterable[str | bytes]) -> None:
    """Put a file in place of what is there, if anything; text in UTF-8."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(p.encode() if isinstance(p, str) else p for p in pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # gone already, if all went well
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        RunError: a URL.
    """
    check_local(folder, "a folder to write to", RunError)
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
