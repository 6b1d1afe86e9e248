"""Write the numbers of a run for Weights & Biases: RUN/wandb/offline-run-TIME-ID.

`wandb sync` uploads the folder. W&B cannot take back a number. So each session logs the whole run
under the same id, its earlier steps from the records, and removes the folder of the session before.
An upload is one run with each step once.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from anybatch.runs.records import read_records
from anybatch.runs.trackers.protocol import import_modules, list_numbers

__all__ = ["WandB"]


@final
class WandB:
    """Writes the files that W&B uploads, and uploads nothing.

    Raises:
        RunError: wandb is not installed.
    """

    places = ("wandb",)

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports to W&B
        (self._wandb,) = import_modules("wandb", "wandb")

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        earlier = sorted((folder / "wandb").glob("offline-run-*"))
        ids = [file.stem.removeprefix("run-") for old in earlier for file in old.glob("*.wandb")]
        self._run = self._wandb.init(
            mode="offline",
            dir=folder,
            id=ids[-1] if ids else None,
            project="anybatch",
            name=folder.name,
            config=dict(settings),
            reinit="create_new",  # leave a W&B run alone that the user has open
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
            if row["step"] < step and (values := list_numbers(row)):
                self.log(row["step"], values)
        for old in earlier:
            shutil.rmtree(old)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See `Tracker`; the next session logs everything again."""

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
