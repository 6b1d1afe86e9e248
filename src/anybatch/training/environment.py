"""What the bits of a run may depend on besides its settings: versions, machine, the user's code."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybatch

__all__ = ["environment", "git_state"]

_FILES = 20  # as many are named
_SECONDS = 3.0  # that git may take for each of its answers
_FOLDERS = "--untracked-files=normal"  # new folders, and not all that is in them
_PLAIN = ("--full-index", "--no-color", "--no-ext-diff", "--no-textconv")
_READ_ONLY = ("--no-optional-locks", "-c", "core.fsmonitor=false")


def environment(run: Path) -> dict[str, Any]:
    """Versions, machine, and the git state of the folder that one is in.

    Args:
        run: the run's folder, whose files are no code.
    """
    return {
        "anybatch": anybatch.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_state(run),
    }


def git_state(run: Path) -> dict[str, Any] | None:
    """The commit, and what differs from it; None without git, a repository or a commit.

    Nothing is written, in the repository either, and nothing is printed.

    Args:
        run: a folder to leave out.

    Returns:
        "commit"; "uncommitted", how many files differ, those that git does not know included;
        "files", the first of them as `git status --porcelain` has them; "diff", the SHA-256 of
        `git diff --full-index HEAD`, None if it is empty. None, too, for what git did not tell in
        time.
    """
    found = _git("rev-parse", "HEAD", "--show-toplevel")
    if found is None:
        return None
    commit, top = os.fsdecode(found).split("\n")[:2]
    others = [":(top)"]
    if (folder := run.resolve()).is_relative_to(top):
        others.append(f":(top,exclude,literal){folder.relative_to(top)}")
    listed = _git("status", "--porcelain", "-z", "--no-renames", _FOLDERS, "--", *others)
    if listed is None:
        return {"commit": commit, "uncommitted": None, "files": None, "diff": None}
    files = os.fsdecode(listed).split("\0")[:-1]
    known = [f":(top,literal){file[3:]}" for file in files if not file.startswith("?")]
    diff = _git("diff", *_PLAIN, "HEAD", "--", *known) if known else None
    return {
        "commit": commit,
        "uncommitted": len(files),
        "files": [os.fsencode(file).decode(errors="replace") for file in files[:_FILES]],
        "diff": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(*arguments: str) -> bytes | None:
    """What git answers; None where it fails, or takes too long."""
    try:
        return subprocess.run(
            ["git", *_READ_ONLY, *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
