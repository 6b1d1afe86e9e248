"""Create or open the folder of a run. One process at a time may write into it.

    check the folder -> lock -> check again -> run.json -> recipe.toml

In a new run, run.json comes first and lists recipe.toml. If the process is stopped in between, the
folder holds only `_FIRST_FILES`, and may become a new run. Nothing in the folder may be a link; the
folder itself may be reached through one.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from anybatch.errors import RunError
from anybatch.runs.checksums import EMPTY, MARK, Checksums, read_file_state
from anybatch.runs.disk import (
    check_file,
    check_folder,
    make_folder,
    open_file,
    read_file,
    replace_file,
)
from anybatch.runs.manifest import MANIFEST

__all__ = ["adopt_checkpoint", "claim_folder", "find_damage", "is_run", "replace_recipe"]

_RECIPE, _RECORDS = "recipe.toml", "records.jsonl"
_FIRST_FILES = {"lock", MARK, _RECORDS} | {f"{name}.partial" for name in (MARK, _RECIPE, _RECORDS)}

_log = logging.getLogger(__name__)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run."""
    return (folder / MARK).is_file()


def claim_folder(
    folder: Path, recipe: str | None, places: Iterable[str] = ()
) -> tuple[IO[bytes], Checksums]:
    """Make a folder a run, or open the run that it is.

    Args:
        recipe: text of the recipe of a new run; None: the folder may be a run already.
        places: further files and folders in it that will be written.

    Returns:
        The open lock file, and the checksums of the run.

    Raises:
        RunError: the folder holds something else, or another process writes into it.
    """
    _check(folder, places, is_new=recipe is not None)
    make_folder(folder)
    lock = _lock(folder / "lock")
    try:
        # Another process may have made a run here since the first check.
        _check(folder, places, is_new=recipe is not None)
        return lock, _open_checksums(folder, recipe)
    except BaseException:
        lock.close()
        raise


def replace_recipe(checksums: Checksums, text: str) -> None:
    """Replace the recipe of a run."""
    file, data = checksums.folder / _RECIPE, text.encode()
    with checksums.announce({file: (len(data), hashlib.sha256(data).hexdigest())}):
        replace_file(file, [data])


def find_damage(checksums: Checksums) -> list[str]:
    """Compare records and recipe with their checksums, before they are changed.

    Damaged records are copied to records.jsonl.damaged-1 (or the next free number).

    Returns:
        A sentence for each file that is missing or changed.

    Raises:
        OSError: a file cannot be read, which is no damage to it.
    """
    damage = checksums.find_damage([_RECORDS], raise_errors=True)
    file = checksums.folder / _RECORDS
    if damage and file.exists():
        damage.append(f"The damaged records are kept in {_copy(file)}.")
    damage += checksums.find_damage([_RECIPE], raise_errors=True)
    for text in damage:
        _log.warning("%s", text)
    return damage


def adopt_checkpoint(checksums: Checksums, path: Path) -> list[str]:
    """Compare the checkpoint of a resume with its checksum, and list its present state.

    Returns:
        A sentence if the run did not write this checkpoint; otherwise nothing.
    """
    file = path / MANIFEST
    state = read_file_state(file)
    if state in checksums.files.get(file.relative_to(checksums.folder).as_posix(), []):
        return []
    checksums.set_state(file, state)
    text = (
        f"{path} is not as {MARK} lists it, and the run goes on from it. If you have not put it "
        f"there, stop and look where it comes from."
    )
    _log.warning("%s", text)
    return [text]


def _open_checksums(folder: Path, recipe: str | None) -> Checksums:
    if is_run(folder) and recipe is None:
        checksums = Checksums.read(folder)
        if checksums.is_old:
            checksums.list_all()
        return checksums
    checksums = Checksums(folder, {"lock": [EMPTY], _RECORDS: [None, EMPTY]})
    checksums.write()
    if recipe is not None:
        replace_recipe(checksums, recipe)
    return checksums


def _check(folder: Path, places: Iterable[str], *, is_new: bool) -> None:
    """Raise unless the folder is new, a run, or a run whose creation was interrupted."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    if folder.is_dir():
        check_file(folder / MARK)
    if not is_run(folder) and not names <= _FIRST_FILES:
        raise RunError(
            f"{folder} exists and is no run. It must be a new folder, or a run to continue. "
            f"Nothing in it was touched: choose another."
        )
    _check_places(folder, places)
    if is_run(folder):
        Checksums.read(folder)  # raises if it cannot be read
        records = folder / _RECORDS
        has_records = records.exists() and records.stat().st_size > 0
        if is_new and (has_records or not names <= _FIRST_FILES):
            raise RunError(
                f"{folder} is a run already, and is not written over. Continue it with "
                f"'anybatch resume {folder}', or choose another folder by --out."
            )


def _check_places(folder: Path, places: Iterable[str]) -> None:
    """Raise if a link or special file lies where the run will write."""
    for name in ("lock", _RECORDS):
        check_file(folder / name, in_place=True)
    for name in (_RECIPE, *(name for name in _FIRST_FILES if name.endswith(".partial"))):
        check_file(folder / name)
    for name, check in (("checkpoints", check_folder), ("ledger", check_file)):
        check_folder(folder / name)
        for path in (folder / name).glob("step*-*"):
            check(path)
    for path in (folder / place for place in places):
        check_folder(path) if path.is_dir() else check_file(path, in_place=True)


def _lock(path: Path) -> IO[bytes]:
    import fcntl  # Windows has no such module, and needs none to import this package

    lock = open_file(path, "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunError(
            f"another process, or another loop of this one, writes into {path.parent}. Only one "
            f"may. Wait for it, stop it, or use another folder; if it is another rank of the same "
            f"training, pass group=... on every rank."
        ) from error
    return lock


def _copy(file: Path) -> Path:
    """Copy a file to the first free name, unless an earlier copy has the same content."""
    number, content = 1, read_file(file)
    while os.path.lexists(copy := file.with_name(f"{file.name}.damaged-{number}")):
        if read_file(copy) == content:
            return copy
        number += 1
    replace_file(copy, [content])
    return copy
