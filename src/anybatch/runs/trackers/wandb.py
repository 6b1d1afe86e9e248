"""Weights & Biases, offline: RUN/wandb/offline-run-TIME-ID, to be uploaded by `wandb sync`.

W&B cannot take back what was logged of steps that are made again. So each session logs the whole
run, its earlier steps from the records, under the same id; the folder of the session before is
removed, and what is uploaded later is one run with each step once.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from anybatch.runs.records import read_records
from anybatch.runs.trackers.protocol import imported, numbers

__all__ = ["WandB"]


@final
class WandB:
    """Writes the files that W&B uploads, and uploads nothing.

    Raises:
        RunError: wandb is not installed.
    """

    places = ("wandb",)

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        (self._wandb,) = imported("wandb", "wandb")

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        earlier = sorted((folder / "wandb").glob("offline-run-*"))
        ids = [file.stem.removeprefix("run-") for one in earlier for file in one.glob("*.wandb")]
        self._run = self._wandb.init(
            mode="offline",
            dir=folder,
            id=ids[-1] if ids else None,
            project="anybatch",
            name=folder.name,
            config=dict(settings),
            reinit="create_new",  # a run that the user has open stays theirs
            settings=self._wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
            ),
        )
        for row in read_records(folder / "records.jsonl"):
            if row["step"] < step and (values := numbers(row)):
                self.log(row["step"], values)
        for one in earlier:
            shutil.rmtree(one)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See `Tracker`: the next session logs all again."""

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
