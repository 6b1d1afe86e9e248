"""TensorBoard: event files in RUN/tensorboard.

On resume TensorBoard itself discards what it has of the steps that are made again (`purge_step`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from anybatch.training.trackers.protocol import imported

__all__ = ["TensorBoard"]


@final
class TensorBoard:
    """Writes event files.

    Raises:
        RunError: tensorboard is not installed.
    """

    places = ("tensorboard",)

    def __init__(self) -> None:
        writers, protos = imported(
            "tensorboard", "torch.utils.tensorboard", "tensorboard.compat.proto.summary_pb2"
        )
        self._open, self._summary = writers.SummaryWriter, protos.Summary

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._writer = self._open(folder / "tensorboard", purge_step=step, flush_secs=10)
        if step == 0:
            text = json.dumps(settings, indent=4)
            self._writer.add_text("settings", f"    {text}".replace("\n", "\n    "), 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        value = self._summary.Value
        # One event a row: add_scalar would write one a number, and takes 12 times as long.
        pairs = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=pairs), step)

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()
