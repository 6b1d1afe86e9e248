"""Write the numbers of a run to TensorBoard: event files in RUN/tensorboard.

On resume, TensorBoard itself discards the steps that are made again: the first event of a session
says from which step on.

The training thread writes the events. TensorBoard's own writer uses another thread, which prints a
traceback when the disk refuses.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, final

from anybatch.runs.trackers.protocol import import_modules

__all__ = ["TensorBoard"]

FLUSH_SECONDS = 10.0
"""Time after which events are flushed, when the next one is logged."""

_numbers = count()


@final
class TensorBoard:
    """Writes event files.

    Raises:
        RunError: tensorboard is not installed.
    """

    places = ("tensorboard",)

    def __init__(self) -> None:
        self._events, self._summaries, self._records, self._text = import_modules(
            "tensorboard",
            "tensorboard.compat.proto.event_pb2",
            "tensorboard.compat.proto.summary_pb2",
            "tensorboard.summary.writer.record_writer",
            "torch.utils.tensorboard.summary",
        )

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        owner = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        file = place / f"events.out.tfevents.{int(time.time()):010d}.{owner}"
        self._file = file.open("xb")
        self._writer = self._records.RecordWriter(self._file)
        self._flush_time = 0.0
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=step, session_log=session)
        if step == 0:
            text = json.dumps(settings, indent=4)
            summary = self._text.text("settings", f"    {text}".replace("\n", "\n    "))
            self._write(step=0, summary=summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        value = self._summaries.Summary.Value
        pairs = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(step=step, summary=self._summaries.Summary(value=pairs))

    def flush(self) -> None:
        """See `Tracker`."""
        with self._close_on_error():
            self._file.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._file.close()

    def _write(self, **content: Any) -> None:
        now = time.time()
        event = self._events.Event(wall_time=now, **content)
        with self._close_on_error():
            self._writer.write(event.SerializeToString())
            if now > self._flush_time + FLUSH_SECONDS:
                self._file.flush()
                self._flush_time = now

    @contextmanager
    def _close_on_error(self) -> Iterator[None]:
        """Close the file if writing fails: the tracker is not called again."""
        try:
            yield
        except OSError:
            with suppress(OSError):
                self._file.close()
            raise
