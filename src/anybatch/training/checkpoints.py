"""Verified checkpoints in a folder: never overwritten, never unpickled unsafely.

    run/step-000000000123/
        model.pt, optimizer.pt, ...    torch.save of each top-level key of the state
        manifest.json                  what must be in these files (see `manifest`)

A checkpoint appears whole or not at all:

    in step-N.partial: write and fsync each file -> manifest, fsync -> fsync the directory
                       -> rename to step-N -> fsync the parent

A checkpoint counts only if every byte of it verifies: `torch.load` alone accepts a flipped
bit without a word. One process writes into a folder at a time.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from anybatch.errors import CheckpointError
from anybatch.training.digest import digest_of_run, num_bytes
from anybatch.training.disk import make_folder, sync_folder
from anybatch.training.manifest import (
    MANIFEST,
    Checkpoint,
    StoredFile,
    compare,
    manifest,
    step_name,
    verify,
)
from anybatch.training.unpickling import unpickle

__all__ = ["Checkpoint", "Refused", "Scan", "load", "named", "newest", "plain", "verify", "write"]

_PARTIAL = ".partial"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A checkpoint that does not verify, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a folder holds: the newest good checkpoint, and the newer ones refused."""

    folder: Path
    found: Checkpoint | None
    refused: tuple[Refused, ...]

    def explain(self) -> str:
        """What was found, what was refused and why, for people."""
        if self.found is not None:
            what, fix = f"{self.found.path.name} is the newest that verifies.", ""
        elif not self.refused:
            what, fix = "no checkpoint there.", ""
        else:
            what = "no checkpoint verifies."
            fix = "\nRestore one from a copy, or start again in another folder."
        reasons = "".join(f"\n  refused: {refused.reason}" for refused in self.refused)
        return f"{self.folder}: {what}{reasons}{fix}"


def named(folder: str | Path) -> list[Path]:
    """Whatever has the name of a checkpoint, good or damaged, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [
        path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"step-(\d+)", path.name))
        and path.name == step_name(int(match[1]))
    ]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest(folder: str | Path) -> Scan:
    """Find the newest checkpoint of a folder that verifies.

    Args:
        folder: where the checkpoints of one run lie; it need not exist.

    Returns:
        The first that verifies, from the newest on, or None; and those refused before it.
    """
    folder = Path(folder)
    refused: list[Refused] = []
    for path in named(folder):
        try:
            return Scan(folder=folder, found=verify(path), refused=tuple(refused))
        except CheckpointError as error:
            refused.append(Refused(path=path, reason=str(error)))
    return Scan(folder=folder, found=None, refused=tuple(refused))


def load(checkpoint: Checkpoint) -> dict[str, Any]:
    """Load the state of a checkpoint, from bytes verified as they are read.

    Args:
        checkpoint: from `newest`, `verify` or `write`.

    Returns:
        The state, bit for bit, with all tensors on the CPU.

    Raises:
        CheckpointError: if the files changed since, if they hold objects that only unsafe
            unpickling could make (nothing of them is run), or another content than the digest's.
    """
    state = {}
    for stored in checkpoint.files:
        file = checkpoint.path / stored.name
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}), although it verified before. "
                f"Was the checkpoint pruned or moved? Scan the folder again."
            ) from error
        compare(file, stored, len(data), hashlib.sha256(data).hexdigest())
        state[file.stem] = unpickle(io.BytesIO(data), "cpu", file)
    found = digest_of_run(state)
    if found != checkpoint.digest:
        raise CheckpointError(
            f"{checkpoint.path}: expected a state of digest {checkpoint.digest}, found {found}, "
            f"although every file verifies. Somebody replaced files and manifest together: "
            f"use another checkpoint."
        )
    return state


def write(
    folder: str | Path, *, step: int, state: dict[str, Any], settings: dict[str, Any], keep: int = 2
) -> Checkpoint:
    """Write one checkpoint so that it appears whole or not at all.

    A good checkpoint of this step with the same content is kept as it is; a damaged one is
    moved aside and logged, never deleted. Of the older ones, the `keep - 1` newest that
    verify stay; they are read again for that, since a damaged one is no fallback.

    Args:
        folder: where the checkpoints of one run lie; made if missing.
        step: updates done, at least 0.
        state: what `digest` takes, without NumPy; keys of the top level match [a-z0-9_]+, and
            each is one file.
        settings: plain JSON (dicts with str keys, lists, str, finite numbers, bool, None).
        keep: how many checkpoints stay, this one included; at least 2.

    Returns:
        The checkpoint that the folder now holds for this step.

    Raises:
        CheckpointError: if an argument cannot be stored, if there is a good checkpoint of this
            step with another content or other settings, or if the disk refuses.
    """
    _check_arguments(step, state, keep)
    folder = Path(folder)
    content, settings = digest_of_run(state), plain(settings)
    path = folder / step_name(step)
    try:
        make_folder(folder)
        for stale in folder.glob(f"step-*{_PARTIAL}"):
            _log.warning("%s is removed: a write that was cut off has left it.", stale)
            shutil.rmtree(stale, ignore_errors=True)
        checkpoint = _existing(path, content, settings)
        if checkpoint is None:
            checkpoint = _write_new(path, step, state, settings, content)
        sync_folder(folder)
    except OSError as error:
        raise _disk_refused(path, num_bytes(state), error) from error
    _prune(folder, step, keep)
    return checkpoint


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from JSON.

    Raises:
        CheckpointError: settings that JSON cannot hold, or that it would change.
    """
    try:
        read: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"settings: expected plain JSON, got {settings!r}: {error}. Convert them first."
        ) from error
    if read != settings:
        raise CheckpointError(
            f"settings: expected what JSON can hold, got {settings!r}, which would come back as "
            f"{read!r}. Use lists instead of tuples, and str keys."
        )
    return read


def _check_arguments(step: int, state: dict[str, Any], keep: int) -> None:
    if type(step) is not int or step < 0:
        raise CheckpointError(f"expected a step of at least 0, got {step!r}.")
    if keep < 2:
        raise CheckpointError(
            f"expected keep of at least 2, got {keep}: damage to a single checkpoint would lose "
            f"the run."
        )
    for key in state:
        if not (isinstance(key, str) and re.fullmatch(r"[a-z0-9_]+", key)):
            raise CheckpointError(
                f"state has the key {key!r}, expected lower-case letters, digits and underscores: "
                f"each top-level key names a file. Rename it."
            )


def _existing(path: Path, content: str, settings: dict[str, Any]) -> Checkpoint | None:
    """The good checkpoint already at `path`; None once nothing is there."""
    if not os.path.lexists(path):
        return None
    try:
        found = verify(path)
    except CheckpointError as error:
        aside = _aside(path)
        path.rename(aside)
        _log.warning("moved a damaged checkpoint aside to %s: %s", aside, error)
        return None
    if (found.digest, found.settings) != (content, settings):
        raise CheckpointError(
            f"{path} is a good checkpoint with digest {found.digest} and settings "
            f"{found.settings}; the one to write has digest {content} and settings {settings}. "
            f"Checkpoints are never overwritten. Save a step once the body of the loop has changed "
            f"all that it changes; if another run wrote this one, use another folder."
        )
    return found


def _aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return aside


def _write_new(
    path: Path, step: int, state: dict[str, Any], settings: dict[str, Any], content: str
) -> Checkpoint:
    partial = path.with_name(path.name + _PARTIAL)
    try:
        partial.mkdir()
        files = tuple(_store_value(partial / f"{key}.pt", state[key]) for key in sorted(state))
        checkpoint = Checkpoint(
            path=path, step=step, digest=content, settings=settings, files=files
        )
        _store(partial / MANIFEST, lambda out: out.write(manifest(checkpoint)))
        sync_folder(partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, if all went well
    return checkpoint


def _store_value(path: Path, value: object) -> StoredFile:
    stored = _store(path, lambda out: torch.save(value, cast(IO[bytes], out)))
    with path.open("rb") as file:
        unpickle(file, "meta", path)  # refuse now what `load` would refuse; reads no elements
    return stored


def _store(path: Path, save: Callable[["_Output"], object]) -> StoredFile:
    """Write one file through to the disk."""
    with path.open("xb") as file:
        out = _Output(file)
        try:
            save(out)
        except RuntimeError:
            # torch.save hides a failed write behind "unexpected pos" of its zip writer.
            if out.error is not None:
                raise out.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(name=path.name, num_bytes=out.num_bytes, sha256=out.sha256.hexdigest())


class _Output:
    """A file that counts and hashes what is written to it, and remembers why it could not."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.num_bytes += len(data)
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _disk_refused(path: Path, needed: int, error: OSError) -> CheckpointError:
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space or raise the quota" if full else "Check the permissions and the disk"
    return CheckpointError(
        f"could not write {path}: {error}. Needed: {needed / 1e6:.3f} MB for the tensors; free: "
        f"{free / 1e6:.3f} MB. The previous checkpoint is untouched. {fix}, or use another "
        f"folder, and resume."
    )


def _prune(folder: Path, step: int, keep: int) -> None:
    num_good = 1
    for path in named(folder):
        if int(path.name[5:]) >= step:
            continue
        if num_good < keep:
            num_good += _is_good(path)
        else:
            # Renamed first: a crash in between leaves no half of a checkpoint under its name.
            shutil.rmtree(path.rename(path.with_name(path.name + _PARTIAL)), ignore_errors=True)


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        _log.warning("a damaged checkpoint does not count as one kept: %s", error)
        return False
    return True
