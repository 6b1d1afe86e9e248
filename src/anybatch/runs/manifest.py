"""Manifest of a checkpoint: it states every file, and `verify` compares each byte with it.

    manifest.json = sealed JSON of {format, step, digest, settings, files}      (see `checksums`)
    files         = {name: [size in bytes, SHA-256]}

Every future format must be sealed in the same way. Otherwise a newer manifest would look damaged.
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
    "check_content",
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
    """A checkpoint whose files agreed with its manifest."""

    path: Path
    step: int  # updates done
    digest: str  # of the state's content
    settings: dict[str, Any]  # what must match on resume
    files: tuple[StoredFile, ...]


def format_step_name(step: int) -> str:
    """Build the name of the folder that holds the checkpoint of a step."""
    return f"step-{step:012d}"


def format_manifest(checkpoint: Checkpoint) -> bytes:
    """Write the sealed manifest of a checkpoint."""
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
        path: the folder of the checkpoint.

    Returns:
        The checkpoint, with all that its manifest states.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unexpected; the message names it.
    """
    path = Path(path)
    try:
        check_folder(path)
        checkpoint = _parse(path, _read_manifest(path))
        _check_names(checkpoint)
        for stored in checkpoint.files:
            num_bytes, sha256 = read_file_state(path / stored.name) or (0, None)  # may be gone now
            check_content(path / stored.name, stored, num_bytes, sha256)
    except RunError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). A checkpoint must be readable. "
            f"Check its permissions, and the disk."
        ) from error
    return checkpoint


def check_content(path: Path, stored: StoredFile, num_bytes: int, sha256: str | None) -> None:
    """Compare the content of a file with its manifest.

    Args:
        path: the file, for the message.
        stored: the entry in the manifest.
        num_bytes: size of the file.
        sha256: hash of the file; None: compare only the size.
    """
    if num_bytes != stored.num_bytes:
        what = "truncated" if num_bytes < stored.num_bytes else "bytes added"
        expected, actual = f"{stored.num_bytes} bytes", f"{num_bytes}"
    elif sha256 not in (None, stored.sha256):
        what, expected, actual = "byte changed", f"SHA-256 {stored.sha256}", f"{sha256}"
    else:
        return
    raise CheckpointError(
        f"{path}: {what}. The manifest states {expected}; the file has {actual}. The disk or a "
        f"copy damaged it: use another checkpoint, or restore the file."
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest in a folder, and check its seal."""
    file = path / MANIFEST
    check_file(file)
    if not file.exists():
        raise CheckpointError(
            f"{path}: foreign: no manifest. A checkpoint has a {MANIFEST}. This one was copied in "
            f"part, or this library did not write it: use another."
        )
    data = read_file(file)
    body = unseal(data)
    if body is not None:
        return body
    raise CheckpointError(
        f"{file}: byte changed, truncated or foreign. Its {len(data)} bytes do not hash to the "
        f"sha256 that they state. Use another checkpoint, or restore the file from a copy."
    )


def _parse(path: Path, body: dict[str, Any]) -> Checkpoint:
    version = body.get("format")
    if version != _FORMAT:
        newer = isinstance(version, int) and version > _FORMAT
        raise CheckpointError(
            f"{path / MANIFEST}: {'written by a newer version' if newer else 'foreign'}. Its "
            f"format is {version!r}, and this version reads {_FORMAT}. Use the version of "
            f"anybatch that wrote it."
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
            f"{path / MANIFEST}: foreign. A manifest has step, digest, settings and files, and "
            f"reading them gave {error!r}. This library did not write it: use another checkpoint."
        ) from error
    if re.fullmatch(r"step-\d+", path.name) and path.name != format_step_name(checkpoint.step):
        raise CheckpointError(
            f"{path}: renamed. It holds step {checkpoint.step}, so its name must be "
            f"{format_step_name(checkpoint.step)}. Give it its name back."
        )
    return checkpoint


def _check_names(checkpoint: Checkpoint) -> None:
    expected = {MANIFEST, *(stored.name for stored in checkpoint.files)}
    actual = set(os.listdir(checkpoint.path))
    if missing := sorted(expected - actual):
        raise CheckpointError(
            f"{checkpoint.path / missing[0]}: missing. The checkpoint must hold "
            f"{sorted(expected)}, and it holds {sorted(actual)}. Restore the file from a copy, or "
            f"use another checkpoint."
        )
    if extra := sorted(actual - expected):
        raise CheckpointError(
            f"{checkpoint.path / extra[0]}: unexpected file. The checkpoint holds only "
            f"{sorted(expected)}. Somebody wrote into the folder: move the file away."
        )
