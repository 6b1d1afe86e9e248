"""A run: a folder with its records and checkpoints.

    RUN/
        run.json          marks the folder as a run: format and version
        recipe.toml       the resolved recipe, where the command line made the run
        records.jsonl     one JSON object a line: sessions, steps, evaluations
        checkpoints/      see `checkpoints`

One process writes into a run at a time. A resumed run goes on from its newest checkpoint that
verifies; records of later steps are dropped, since these steps are made again, the same.
"""

import fcntl
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import anybatch
from anybatch.errors import CheckpointError, RunError
from anybatch.training import checkpoints
from anybatch.training.checkpoints import Checkpoint
from anybatch.training.digest import refuse_non_finite
from anybatch.training.state import TrainingState

__all__ = ["Run", "environment"]

_FORMAT = 1


class Run:
    """A run's folder, opened for writing.

    Args:
        folder: made if missing; if it is a run already, it is continued.
        checkpoint_every: updates between checkpoints; None: at the end of each epoch. The last
            update of a run is always checkpointed.
        keep: how many checkpoints stay, at least 2.
        settings: further settings that must not change on resume, as plain JSON.

    Raises:
        RunError: a folder that holds something else, or that another process writes into.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        checkpoint_every: int | None = None,
        keep: int = 2,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise RunError(f"expected checkpoint_every of at least 1, got {checkpoint_every}.")
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self._keep = keep
        self._settings = dict(settings or {})
        _claim(self.folder)
        self._lock = _locked(self.folder / "lock")
        self._records: IO[str] = (self.folder / "records.jsonl").open("a")

    def begin(self, state: TrainingState, settings: Mapping[str, Any]) -> int:
        """Take up the newest good checkpoint, if there is one.

        Args:
            state: restored in place.
            settings: what must be as it was, by name, as plain JSON.

        Returns:
            Updates made so far, 0 in a new run.

        Raises:
            RunError: a setting that differs from the checkpoint's; CheckpointError: checkpoints
                of which none verifies.
        """
        self._settings |= settings
        scan = checkpoints.newest(self.folder / "checkpoints")
        if scan.found is None:
            if scan.refused:
                raise CheckpointError(scan.explain())
            step = 0
        else:
            _compare(scan.found, self._settings)
            state.restore(checkpoints.load(scan.found))
            step = scan.found.step
        self._drop_records(step)
        refused = [refused.reason for refused in scan.refused]
        self.record({"kind": "session", "step": step, "refused": refused, **environment()})
        return step

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is on the disk at the next checkpoint, or when the run is closed.

        Args:
            row: plain JSON with "kind" and "step".
        """
        self._records.write(json.dumps(row) + "\n")

    def checkpoint(self, step: int, state: TrainingState) -> Checkpoint:
        """Write a verified checkpoint after `step` updates, the records first.

        Raises:
            CheckpointError: weights that are not finite, or a disk that refuses.
        """
        self.flush()
        content = state.dump()
        refuse_non_finite({"model": content["model"]})
        return checkpoints.write(
            self.folder / "checkpoints",
            step=step,
            state=content,
            settings=self._settings,
            keep=self._keep,
        )

    def flush(self) -> None:
        """Bring the records to the disk."""
        self._records.flush()
        os.fsync(self._records.fileno())

    def close(self) -> None:
        """Bring the records to the disk, and let other processes write."""
        if not self._records.closed:
            self.flush()
            self._records.close()
            self._lock.close()

    def _drop_records(self, step: int) -> None:
        """Keep the records of the updates made, and the history of sessions."""
        path = self.folder / "records.jsonl"
        kept = [row for row in read_records(path) if row["kind"] == "session" or row["step"] < step]
        fresh = path.with_suffix(".partial")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._records.close()
        fresh.replace(path)
        self._records = path.open("a")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a records file; a last line that a crash cut off is left out."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def environment() -> dict[str, Any]:
    """What the bits of a run may depend on besides its settings."""
    return {
        "anybatch": anybatch.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def is_run(folder: Path) -> bool:
    """Whether a folder is a run."""
    return (folder / "run.json").is_file()


def _claim(folder: Path) -> None:
    """Make the folder a run, or see that it is one."""
    if is_run(folder):
        mark = json.loads((folder / "run.json").read_text())
        if mark.get("format") != _FORMAT:
            raise RunError(
                f"{folder} is a run of format {mark.get('format')}, expected {_FORMAT}. "
                f"Use the version of anybatch that made it: {mark.get('anybatch')}."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} exists and is no run, expected a new folder or a run to continue. "
            f"Nothing in it was touched: choose another."
        )
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "run.json.partial"
    fresh.write_text(json.dumps({"format": _FORMAT, "anybatch": anybatch.__version__}) + "\n")
    fresh.replace(folder / "run.json")


def _locked(path: Path) -> IO[str]:
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RunError(
            f"another process writes into {path.parent}, expected to be the only one. "
            f"Wait for it, stop it, or use another folder."
        ) from error
    return lock


def _compare(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    before = checkpoint.settings
    for name in sorted({*before, *settings}):
        old, new = before.get(name), settings.get(name)
        if old != new:
            raise RunError(
                f"{checkpoint.path.parent.parent} was begun with {name} = {old!r}, "
                f"and cannot go on with {new!r}: the run would be neither. "
                f"Restore the setting, or begin a new run in another folder."
            )
