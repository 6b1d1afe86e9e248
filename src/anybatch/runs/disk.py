"""Read and write files safely: a file appears whole or not at all, even after a power cut.

    write and fsync under another name -> rename -> fsync the folder

Links are not followed (O_NOFOLLOW), and named pipes do not block (O_NONBLOCK). Only plain files are
opened.
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
    "flush_file",
    "make_disk_error",
    "make_folder",
    "open_file",
    "open_replacement",
    "read_file",
    "remove_folder",
    "replace_file",
    "sync_folder",
]


def check_file(path: Path, *, in_place: bool = False) -> None:
    """Raise if the path is anything but a plain file; a missing file is fine.

    Args:
        in_place: the file will be changed where it is. Then it must have no other name (hard link).

    Raises:
        RunError: the path is a link, named pipe, socket, device, folder or hard link.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise _make_error(path, status.st_mode, "a plain file")
    if in_place and status.st_nlink > 1:
        raise RunError(
            f"{path} is one file under {status.st_nlink} names (hard links). A change would show "
            f"under all of them, so it must have one name alone. Copy it: "
            f"cp -p {path} {path}.copy && mv {path}.copy {path}"
        )


def check_folder(path: Path) -> None:
    """Raise if the path is anything but a folder; a missing folder is fine.

    Raises:
        RunError: the path is a file, a link or something else.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise _make_error(path, mode, "a folder")


def open_file(path: Path, mode: Literal["rb", "r+b", "ab", "xb"]) -> IO[bytes]:
    """Open a plain file.

    Raises:
        RunError: see `check_file`. OSError: as `open`.
    """
    check_file(path, in_place=mode in ("r+b", "ab"))
    file: IO[bytes] = open(path, mode, opener=_open_without_links)  # noqa: SIM115
    mode_now = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode_now):  # somebody replaced the file after the check
        file.close()
        raise _make_error(path, mode_now, "a plain file")
    return file


def read_file(path: Path) -> bytes:
    """Read a plain file."""
    with open_file(path, "rb") as file:
        return file.read()


def replace_file(path: Path, pieces: Iterable[str | bytes]) -> None:
    """Write a file, and replace the one that is there; text is written as UTF-8."""
    with open_replacement(path) as file:
        file.writelines(p.encode() if isinstance(p, str) else p for p in pieces)


@contextmanager
def open_replacement(
    path: Path, around: Callable[[Path], AbstractContextManager[object]] = nullcontext
) -> Iterator[IO[bytes]]:
    """Open a new file that replaces `path` when the block ends.

    Args:
        path: the file to replace.
        around: gets the path of the new file; its context is active during the replacement.
    """
    partial = path.with_name(path.name + ".partial")
    check_file(path)
    check_file(partial)
    partial.unlink(missing_ok=True)  # a process that was killed may have left one
    try:
        with open_file(partial, "xb") as file:
            yield file
            flush_file(file)
        with around(partial):
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # it is there only after an error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents."""
    check_local(folder, "a folder to write to", RunError)
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder and its content; links are removed, and not their targets.

    Raises:
        RunError: the path is a link or a file.
    """
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def flush_file(file: IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def make_disk_error(path: Path, error: OSError) -> RunError:
    """Make the error for a file of a run that the disk refuses."""
    return RunError(
        f"could not write {path}: {error}. The checkpoints are untouched. Free some space or check "
        f"the disk, and resume."
    )


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _make_error(path: Path, mode: int, expected: str) -> RunError:
    kind = name_kind(mode)
    if kind == "a link":
        return RunError(
            f"{path} is a link to {os.readlink(path)}. It must be {expected}, so that nothing "
            f"outside the run is read or changed. Replace the link by {expected}, or choose "
            f"another path."
        )
    return RunError(
        f"{path} is {kind}. It must be {expected}. Move it away, or choose another path."
    )
