"""Write and load checkpoints. They are verified, and never overwritten or unpickled unsafely.

    run/step-000000000123/
        model.pt, optimizer.pt, ...    torch.save of each top-level key of the state
        manifest.json                  what must be in these files (see `manifest`)

A checkpoint appears whole or not at all:

    in step-N.partial: write and fsync each file -> manifest, fsync -> fsync the folder
                       -> rename to step-N -> fsync the parent

A checkpoint counts only if every byte of it verifies: `torch.load` alone accepts a flipped bit
without an error. One process writes into a folder at a time.
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
    check_content,
    format_manifest,
    format_step_name,
    verify,
)
from anybatch.runs.tensor_files import load_value, store, store_value

__all__ = [
    "Checkpoint",
    "Refusal",
    "Scan",
    "check_settings",
    "find_newest",
    "list_paths",
    "load",
    "verify",
    "write",
]

_PARTIAL = ".partial"
_KEYS = ("model", "optimizer", "reduction", "loss_scale", "user")  # of the state of a training

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A checkpoint that does not verify, and the reason."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Newest good checkpoint of a folder, and the newer ones that do not verify."""

    folder: Path
    checkpoint: Checkpoint | None
    refusals: tuple[Refusal, ...]

    def explain(self) -> str:
        """Say which checkpoint was chosen, which were refused, and why."""
        if self.checkpoint is not None:
            what, fix = f"{self.checkpoint.path.name} is the newest that verifies.", ""
        elif not self.refusals:
            what, fix = "no checkpoint there.", ""
        else:
            what = "no checkpoint verifies."
            fix = "\nRestore one from a copy, or start again in another folder."
        reasons = "".join(f"\n  refused: {refusal.reason}" for refusal in self.refusals)
        return f"{self.folder}: {what}{reasons}{fix}"


def list_paths(folder: str | Path) -> list[Path]:
    """List all paths that have the name of a checkpoint, good or damaged, newest first."""
    folder = Path(folder)
    check_folder(folder)
    if not folder.exists():
        return []
    paths = [path for path in folder.iterdir() if _is_checkpoint_name(path.name)]
    return sorted(paths, key=_parse_step, reverse=True)


def find_newest(folder: str | Path) -> Scan:
    """Find the newest checkpoint of a folder that verifies.

    Args:
        folder: the checkpoints of one run; it need not exist.

    Returns:
        The first that verifies, from the newest on, or None; and those refused before it.
    """
    folder = Path(folder)
    refusals: list[Refusal] = []
    for path in list_paths(folder):
        try:
            return Scan(folder=folder, checkpoint=verify(path), refusals=tuple(refusals))
        except CheckpointError as error:
            refusals.append(Refusal(path=path, reason=str(error)))
    return Scan(folder=folder, checkpoint=None, refusals=tuple(refusals))


def load(checkpoint: Checkpoint) -> dict[str, Any]:
    """Load the state of a checkpoint, and verify its bytes as they are read.

    Args:
        checkpoint: from `find_newest`, `verify` or `write`.

    Returns:
        The state, bit for bit, with all tensors on the CPU.

    Raises:
        CheckpointError: the files have changed since; they hold objects that only unsafe
            unpickling could make (none of their code is run); their content has another digest;
            or, for a training, a part is missing or a weight is not finite.
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
        check_content(file, stored, len(data), hashlib.sha256(data).hexdigest())
        state[file.stem] = load_value(data, file)
    content = digest_run(state)
    if content != checkpoint.digest:
        raise CheckpointError(
            f"{checkpoint.path}: its state has the digest {content}, and its manifest states "
            f"{checkpoint.digest}. Every file verifies, so somebody replaced files and manifest "
            f"together. Use another checkpoint."
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
    announce: AnnounceChanges = ignore_changes,
) -> Checkpoint:
    """Write one checkpoint so that it appears whole or not at all.

    If there is a good checkpoint of this step with the same content, it stays as it is. A damaged
    one is moved aside and logged, never deleted. Of the older ones, the `keep - 1` newest that
    verify stay. They are read again for that, since a damaged one is no fallback.

    Args:
        folder: the checkpoints of one run; made if missing.
        step: updates done, at least 0.
        state: as for `digest`, without NumPy; keys of the top level match [a-z0-9_]+, and each is
            one file.
        settings: plain JSON (dicts with str keys, lists, str, finite numbers, bool, None).
        keep: how many checkpoints stay, this one included; at least 2.
        announce: gets the new manifest, and those that are removed.

    Returns:
        The checkpoint that the folder now holds for this step.

    Raises:
        CheckpointError: an argument cannot be stored; there is a good checkpoint of this step with
            another content or other settings; or the disk refuses.
    """
    _check_arguments(step, state, keep)
    folder = Path(folder)
    content, settings = digest_run(state), check_settings(settings)
    path = folder / format_step_name(step)
    partial = folder / f"{path.name}{_PARTIAL}"
    try:
        check_folder(folder)
        make_folder(folder)
        _remove_leftovers(folder)
        checkpoint = _find_existing(path, content, settings)
        is_new = checkpoint is None
        if checkpoint is None:
            checkpoint = _write_partial(path, partial, step, state, settings, content)
        old = _list_old(folder, step, keep)
        changes = {path / MANIFEST: read_file_state((partial if is_new else path) / MANIFEST)}
        with announce(changes | dict.fromkeys(other / MANIFEST for other in old)):
            if is_new:
                partial.rename(path)
            sync_folder(folder)
            for other in old:
                check_folder(other)
                # Renamed first: a crash in between leaves no half of a checkpoint under its name.
                remove_folder(other.rename(other.with_name(other.name + _PARTIAL)))
    except OSError as error:
        raise _explain_disk_error(path, count_bytes(state), error) from error
    finally:
        if partial.exists():
            remove_folder(partial)
    return checkpoint


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Check that settings are plain JSON, and return them as they come back from JSON.

    Raises:
        CheckpointError: JSON cannot hold the settings, or it would change them.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"settings = {settings!r} are no plain JSON: {error}. Convert them first."
        ) from error
    if copy != settings:
        raise CheckpointError(
            f"settings = {settings!r} would come back from JSON as {copy!r}. Use lists in place of "
            f"tuples, and str keys."
        )
    return copy


def _check_training(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Raise if no training can have saved this state."""
    weights = checkpoint.settings.get("model")
    if not isinstance(weights, dict):
        return  # only the state of a training has this setting
    for key in _KEYS:
        if not isinstance(state.get(key), dict):
            raise CheckpointError(
                f"{checkpoint.path}: {key}.pt is missing or holds no dict, and every training "
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
        raise CheckpointError(f"step is {step!r}. It must be an integer of at least 0.")
    if keep < 2:
        raise CheckpointError(
            f"keep is {keep}. It must be at least 2: damage to a single checkpoint would lose the "
            f"run."
        )
    for key in state:
        if not (isinstance(key, str) and re.fullmatch(r"[a-z0-9_]+", key)):
            raise CheckpointError(
                f"state has the key {key!r}. Each top-level key names a file: it must have "
                f"lower-case letters, digits and underscores only. Rename it."
            )


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.endswith(_PARTIAL) and _is_checkpoint_name(path.name.removesuffix(_PARTIAL)):
            remove_folder(path)
            _log.warning("%s is removed: a write that was interrupted has left it.", path)


def _is_checkpoint_name(name: str) -> bool:
    match = re.fullmatch(r"step-(\d+)", name)
    return match is not None and name == format_step_name(int(match[1]))


def _parse_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _find_existing(path: Path, content: str, settings: dict[str, Any]) -> Checkpoint | None:
    """Verify the checkpoint at `path`, if there is one; a damaged one is moved aside."""
    if not os.path.lexists(path):
        return None
    try:
        existing = verify(path)
    except CheckpointError as error:
        aside = _find_free_name(path)
        path.rename(aside)
        _log.warning("moved a damaged checkpoint aside to %s: %s", aside, error)
        return None
    # The fingerprint of the data holds times of files. It was compared as the run began.
    names = (existing.settings.keys() | settings.keys()) - {DATA}
    others = sorted(n for n in names if existing.settings.get(n, ...) != settings.get(n, ...))
    if existing.digest != content or others:
        difference = f" Settings that differ: {', '.join(others)}." if others else ""
        raise CheckpointError(
            f"{path} is a good checkpoint with digest {existing.digest}, and the one to write has "
            f"digest {content}.{difference} Checkpoints are never overwritten. Save a step once "
            f"the body of the loop has changed all that it changes; if another run wrote this one, "
            f"use another folder."
        )
    return existing


def _find_free_name(path: Path) -> Path:
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
    """Write the files of a checkpoint in its partial folder."""
    partial.mkdir()
    files = tuple(store_value(partial / f"{key}.pt", state[key]) for key in sorted(state))
    checkpoint = Checkpoint(path=path, step=step, digest=content, settings=settings, files=files)
    store(partial / MANIFEST, lambda out: out.write(format_manifest(checkpoint)))
    sync_folder(partial)
    return checkpoint


def _explain_disk_error(path: Path, needed: int, error: OSError) -> CheckpointError:
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space or raise the quota" if is_full else "Check the permissions and the disk"
    return CheckpointError(
        f"could not write {path}: {error}. Needed: {needed / 1e6:.3f} MB for the tensors; free: "
        f"{free / 1e6:.3f} MB. The previous checkpoint is untouched. {fix}, or use another "
        f"folder, and resume."
    )


def _list_old(folder: Path, step: int, keep: int) -> list[Path]:
    """List the older checkpoints that need not stay."""
    num_good, old = 1, []
    for path in list_paths(folder):
        if _parse_step(path) >= step:
            continue
        if num_good < keep:
            num_good += _is_good(path)
        else:
            old.append(path)
    return old


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError as error:
        _log.warning("a damaged checkpoint does not count among those that stay: %s", error)
        return False
    return True
