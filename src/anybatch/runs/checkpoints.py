"""Verified checkpoints in a folder: never overwritten, never unpickled unsafely.

    run/step-000000000123/
        model.pt, optimizer.pt, ...    torch.save of each top-level key of the state
        manifest.json                  what must be in these files (see `format_manifest`)

A checkpoint appears whole or not at all:

    in step-N.partial: write and fsync each file -> manifest, fsync -> fsync the directory
                       -> rename to step-N -> fsync the parent

A checkpoint counts only if every byte of it verifies: `torch.load` alone accepts a flipped
bit without a word. One process writes into a folder at a time.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybatch.errors import CheckpointError
from anybatch.runs.checksums import AnnounceChanges, ignore_changes, read_file_state
from anybatch.runs.data_fingerprint import DATA
from anybatch.runs.digest import count_bytes, digest_run, refuse_non_finite
from anybatch.runs.disk import check_folder, make_folder, read_file, remove_folder, sync_folder
from anybatch.runs.manifest import (
    MANIFEST,
    Checkpoint,
    compare,
    format_manifest,
    format_step_name,
    verify,
)
from anybatch.runs.tensor_files import load_value, store, store_value

__all__ = ["Checkpoint", "Refused", "Scan", "load", "named", "newest", "plain", "verify", "write"]

_PARTIAL = ".partial"
_PARTS = ("model", "optimizer", "reduction", "loss_scale", "user")  # of a training's state

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
    check_folder(folder)
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if _is_name(path.name)]
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
            unpickling could make (nothing of them is run), or another content than the digest's;
            of a training, if a part is missing or a weight is not finite.
    """
    state = {}
    for stored in checkpoint.files:
        file = checkpoint.path / stored.name
        try:
            data = read_file(file)
        except OSError as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}), although it verified before. "
                f"Was the checkpoint pruned or moved? Scan the folder again."
            ) from error
        compare(file, stored, len(data), hashlib.sha256(data).hexdigest())
        state[file.stem] = load_value(data, file)
    found = digest_run(state)
    if found != checkpoint.digest:
        raise CheckpointError(
            f"{checkpoint.path}: expected a state of digest {checkpoint.digest}, found {found}, "
            f"although every file verifies. Somebody replaced files and manifest together: "
            f"use another checkpoint."
        )
    _check_training(checkpoint, state)
    return state


def write(
    folder: str | Path,
    *,
    step: int,
    state: dict[str, Any],
    settings: dict[str, Any],
    keep: int = 2,
    changing: AnnounceChanges = ignore_changes,
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
        changing: announces the new manifest, and those that are removed.

    Returns:
        The checkpoint that the folder now holds for this step.

    Raises:
        CheckpointError: if an argument cannot be stored, if there is a good checkpoint of this
            step with another content or other settings, or if the disk refuses.
    """
    _check_arguments(step, state, keep)
    folder = Path(folder)
    content, settings = digest_run(state), plain(settings)
    path = folder / format_step_name(step)
    partial = folder / f"{path.name}{_PARTIAL}"
    try:
        check_folder(folder)
        make_folder(folder)
        _remove_stale(folder)
        checkpoint = _existing(path, content, settings)
        is_new = checkpoint is None
        if checkpoint is None:
            checkpoint = _write_partial(path, partial, step, state, settings, content)
        old = _superseded(folder, step, keep)
        changes = {path / MANIFEST: read_file_state((partial if is_new else path) / MANIFEST)}
        with changing(changes | dict.fromkeys(one / MANIFEST for one in old)):
            if is_new:
                partial.rename(path)
            sync_folder(folder)
            _remove(old)
    except OSError as error:
        raise _disk_refused(path, count_bytes(state), error) from error
    finally:
        if partial.exists():
            remove_folder(partial)
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


def _check_training(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Refuse the state of a training that no training would have saved."""
    weights = checkpoint.settings.get("model")
    if not isinstance(weights, dict):
        return  # other states than those of a training have no such setting
    for part in _PARTS:
        if not isinstance(state.get(part), dict):
            raise CheckpointError(
                f"{checkpoint.path}: {part}.pt is missing or holds no dict, and every training "
                f"saves one. The checkpoint was changed after it was written: use another."
            )
    advice = (
        f"No such weights are saved: {checkpoint.path} was changed after it was written. Move it "
        f"away, and the checkpoint before it is taken."
    )
    model = {name: state["model"][name] for name in weights if name in state["model"]}
    refuse_non_finite({"model": model}, advice)


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


def _remove_stale(folder: Path) -> None:
    for path in folder.iterdir():
        if _is_name(path.name.removesuffix(_PARTIAL)) and path.name.endswith(_PARTIAL):
            remove_folder(path)
            _log.warning("%s is removed: a write that was cut off has left it.", path)


def _is_name(name: str) -> bool:
    """Whether a checkpoint may have this name."""
    match = re.fullmatch(r"step-(\d+)", name)
    return match is not None and name == format_step_name(int(match[1]))


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
    # The fingerprint of the data holds times of files. It was compared as the run began.
    names = (found.settings.keys() | settings.keys()) - {DATA}
    others = sorted(n for n in names if found.settings.get(n, ...) != settings.get(n, ...))
    if found.digest != content or others:
        differing = f" Settings that differ: {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"{path} is a good checkpoint with digest {found.digest}, and the one to write has "
            f"digest {content}.{differing} Checkpoints are never overwritten. Save a step once the "
            f"body of the loop has changed all that it changes; if another run wrote this one, use "
            f"another folder."
        )
    return found


def _aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return aside


def _write_partial(
    path: Path,
    partial: Path,
    step: int,
    state: dict[str, Any],
    settings: dict[str, Any],
    content: str,
) -> Checkpoint:
    """Write a checkpoint under another name than it will have."""
    partial.mkdir()
    files = tuple(store_value(partial / f"{key}.pt", state[key]) for key in sorted(state))
    checkpoint = Checkpoint(path=path, step=step, digest=content, settings=settings, files=files)
    store(partial / MANIFEST, lambda out: out.write(format_manifest(checkpoint)))
    sync_folder(partial)
    return checkpoint


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


def _superseded(folder: Path, step: int, keep: int) -> list[Path]:
    """The checkpoints that need not be kept besides that of this step."""
    num_good, found = 1, []
    for path in named(folder):
        if int(path.name[5:]) >= step:
            continue
        if num_good < keep:
            num_good += _is_good(path)
        else:
            found.append(path)
    return found


def _remove(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        check_folder(path)
        # Renamed first: a crash in between leaves no half of a checkpoint under its name.
        remove_folder(path.rename(path.with_name(path.name + _PARTIAL)))


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        _log.warning("a damaged checkpoint does not count as one kept: %s", error)
        return False
    return True
