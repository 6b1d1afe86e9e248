"""Files that are there whole or not at all, even after a power cut, and never behind a link.

    write and fsync under another name -> rename -> fsync the folder

A file is opened under its own name (O_NOFOLLOW), without waiting (O_NONBLOCK: a named pipe would
block), and only if it is a plain file.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Literal

from anybatch.errors import RunError
from anybatch.limits import name_kind
from anybatch.paths import check_local

__all__ = [
    "check_file",
    "check_folder",
    "make_folder",
    "open_file",
    "read_file",
    "remove_folder",
    "replace_file",
    "replacing",
    "sync_folder",
]


def check_file(path: Path, *, in_place: bool = False) -> None:
    """Refuse what is no plain file; a file that is missing is fine.

    Args:
        in_place: whether the file is to be changed where it is, which would change it under its
            other names (hard links), too.

    Raises:
        RunError: a link, named pipe, socket, device or folder, by its path; a hard link.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise _refusal(path, found.st_mode, "a plain file")
    if in_place and found.st_nlink > 1:
        raise RunError(
            f"{path} is one file under {found.st_nlink} names (hard links), and all of them would "
            f"change. It must be a file of its own. Copy it: cp -p {path} {path}.copy && "
            f"mv {path}.copy {path}"
        )


def check_folder(path: Path) -> None:
    """Refuse what is no folder, or a link to one; a folder that is missing is fine.

    Raises:
        RunError: what is there instead, by its path.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise _refusal(path, mode, "a folder")


def open_file(path: Path, mode: Literal["rb", "r+b", "ab", "xb"]) -> IO[bytes]:
    """Open a plain file.

    Raises:
        RunError: see `check_file`; OSError: as `open` does.
    """
    check_file(path, in_place=mode in ("r+b", "ab"))
    file: IO[bytes] = open(path, mode, opener=_open_by_own_name)  # noqa: SIM115
    opened = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(opened):  # it was exchanged since it was checked
        file.close()
        raise _refusal(path, opened, "a plain file")
    return file


def read_file(path: Path) -> bytes:
    """Read a plain file.

    Raises:
        RunError: see `check_file`; OSError: as `open` does.
    """
    with open_file(path, "rb") as file:
        return file.read()


def replace_file(path: Path, pieces: Iterable[str | bytes]) -> None:
    """Put a file in place of what is there, if anything; text in UTF-8.

    Raises:
        RunError: see `check_file`.
    """
    with replacing(path) as file:
        file.writelines(p.encode() if isinstance(p, str) else p for p in pieces)


@contextmanager
def replacing(
    path: Path, around: Callable[[Path], AbstractContextManager[object]] = nullcontext
) -> Iterator[IO[bytes]]:
    """Open a new file, which takes the place of what is there once the block is left.

    Args:
        path: the file to replace.
        around: gets the new file under the name that it has until then, and is entered while it
            takes its place.

    Raises:
        RunError: see `check_file`.
    """
    partial = path.with_name(path.name + ".partial")
    check_file(path)
    check_file(partial)
    partial.unlink(missing_ok=True)  # of a process that was cut off
    try:
        with open_file(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with around(partial):
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # gone already, if all went well


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


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it; links in it are removed, and not what they lead to.

    Raises:
        RunError: a link, or a file.
    """
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_by_own_name(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _refusal(path: Path, mode: int, expected: str) -> RunError:
    kind = name_kind(mode)
    if kind == "a link":
        return RunError(
            f"{path} is a link to {os.readlink(path)}. It must be {expected} of its own, so that "
            f"nothing outside is read or changed. Put {expected} in its place, or choose another."
        )
    return RunError(f"{path} is {kind}. It must be {expected}. Move it away, or choose another.")
