"""The manifest of a checkpoint, and the check of every byte against it.

    manifest.json = sealed JSON of {format, step, digest, settings, files}      (see `checksums`)
    files         = {name: [size in bytes, SHA-256]}

The way it is sealed must stay the same for every format to come: that is how a newer one is told
from a damaged one.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybatch.errors import CheckpointError, RunError
from anybatch.runs.checksums import read_file_state, seal, unseal
from anybatch.runs.disk import check_file, check_folder, read_file

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "StoredFile",
    "compare",
    "format_manifest",
    "format_step_name",
    "verify",
]

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of a checkpoint, as its manifest states it."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files verified when this was made."""

    path: Path
    step: int  # updates done
    digest: str  # of the state's content
    settings: dict[str, Any]  # what must match on resume
    files: tuple[StoredFile, ...]


def format_step_name(step: int) -> str:
    """Name of the directory that holds the checkpoint of a step."""
    return f"step-{step:012d}"


def format_manifest(checkpoint: Checkpoint) -> bytes:
    """The manifest of a checkpoint, sealed."""
    return seal(
        {
            "format": _FORMAT,
            "step": checkpoint.step,
            "digest": checkpoint.digest,
            "settings": checkpoint.settings,
            "files": {file.name: [file.num_bytes, file.sha256] for file in checkpoint.files},
        }
    )


def verify(path: str | Path) -> Checkpoint:
    """Check every byte of one checkpoint.

    Args:
        path: the directory of the checkpoint.

    Returns:
        The checkpoint, with all that its manifest states.

    Raises:
        CheckpointError: naming the file that is missing, truncated, changed or unexpected, what
            was expected and what was found.
    """
    path = Path(path)
    try:
        check_folder(path)
        checkpoint = _parse(path, _unseal(path))
        _check_names(checkpoint)
        for stored in checkpoint.files:
            _check_file(path / stored.name, stored)
    except RunError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); expected a readable checkpoint. "
            f"Check its permissions, and the disk."
        ) from error
    return checkpoint


def compare(path: Path, stored: StoredFile, num_bytes: int, sha256: str | None) -> None:
    """Compare what was read of a file with what its manifest states.

    Args:
        path: the file, for the message.
        stored: what is expected.
        num_bytes: the size found.
        sha256: the hash found; None where only the size is to be compared.

    Raises:
        CheckpointError: if they differ.
    """
    if num_bytes != stored.num_bytes:
        what = "truncated" if num_bytes < stored.num_bytes else "bytes added"
        expected, found = f"{stored.num_bytes} bytes", f"{num_bytes}"
    elif sha256 not in (None, stored.sha256):
        what, expected, found = "byte changed", f"SHA-256 {stored.sha256}", f"{sha256}"
    else:
        return
    raise CheckpointError(
        f"{path}: {what}: expected {expected}, found {found}. The disk or a copy damaged it: "
        f"use another checkpoint, or restore the file."
    )


def _unseal(path: Path) -> dict[str, Any]:
    """The content of the manifest in `path`, if it equals the canonical text of what it says."""
    file = path / MANIFEST
    check_file(file)
    if not file.exists():
        raise CheckpointError(
            f"{path}: foreign: no manifest; expected {MANIFEST} in it. It is no checkpoint of "
            f"this library, or was copied in part: use another."
        )
    data = read_file(file)
    body = unseal(data)
    if body is not None:
        return body
    raise CheckpointError(
        f"{file}: byte changed, truncated or foreign: expected a text that hashes to its own "
        f"sha256, found {len(data)} bytes that do not. Use another checkpoint, "
        f"or restore the file from a copy."
    )


def _parse(path: Path, body: dict[str, Any]) -> Checkpoint:
    version = body.get("format")
    if version != _FORMAT:
        newer = isinstance(version, int) and version > _FORMAT
        raise CheckpointError(
            f"{path / MANIFEST}: {'written by a newer version' if newer else 'foreign'}: expected "
            f"format {_FORMAT}, found {version!r}. Use the version of anybatch that wrote it."
        )
    try:
        checkpoint = Checkpoint(
            path=path,
            step=int(body["step"]),
            digest=str(body["digest"]),
            settings=dict(body["settings"]),
            files=tuple(
                StoredFile(name=name, num_bytes=int(size), sha256=str(sha256))
                for name, (size, sha256) in body["files"].items()
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: foreign: expected step, digest, settings and files, found "
            f"{error!r} on reading them. This library did not write it: use another checkpoint."
        ) from error
    if re.fullmatch(r"step-\d+", path.name) and path.name != format_step_name(checkpoint.step):
        raise CheckpointError(
            f"{path}: renamed: expected the name {format_step_name(checkpoint.step)}, since it "
            f"holds that step. Give it its name back."
        )
    return checkpoint


def _check_names(checkpoint: Checkpoint) -> None:
    expected = {MANIFEST, *(stored.name for stored in checkpoint.files)}
    found = set(os.listdir(checkpoint.path))
    if missing := sorted(expected - found):
        raise CheckpointError(
            f"{checkpoint.path / missing[0]}: missing: expected {sorted(expected)}, found "
            f"{sorted(found)}. Restore it from a copy, or use another checkpoint."
        )
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{checkpoint.path / extra[0]}: unexpected file: expected only {sorted(expected)}. "
            f"Somebody wrote into the checkpoint: move the file away."
        )


def _check_file(path: Path, stored: StoredFile) -> None:
    num_bytes, sha256 = read_file_state(path) or (0, None)  # it may have gone since it was listed
    compare(path, stored, num_bytes, sha256)
