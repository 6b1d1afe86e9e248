"""The trackers of a run together: begun at its first row, left out when they fail."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

from anybatch.errors import RunError
from anybatch.training.trackers.protocol import Tracker, numbers

__all__ = ["Trackers"]

_log = logging.getLogger(__name__)


@final
class Trackers:
    """Gives each tracker the rows of a session; one that fails is told of, and not called again.

    They begin with the first row after an update, so that a session without one leaves nothing.

    Raises:
        RunError: what is no tracker.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._used = list(trackers)
        for tracker in self._used:
            if not isinstance(tracker, Tracker) or isinstance(tracker, type):
                raise RunError(
                    f"expected trackers to be objects with begin, log, flush and close, got "
                    f"{tracker!r}. For a name, use tracker_named('tensorboard')."
                )
        self._opening: tuple[Path, int, Mapping[str, Any]] | None = None
        self._begun = False

    @property
    def places(self) -> list[str]:
        """The files and folders in a run that they are known to write."""
        return [place for one in self._used for place in getattr(one, "places", ())]

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Say what they begin with: see `Tracker`."""
        self._opening = folder, step, settings

    def log(self, row: Mapping[str, Any]) -> None:
        """Give them the numbers of a row, if it has any."""
        if not self._used or self._opening is None or not (values := numbers(row)):
            return
        if not self._begun:
            self._begun = True
            self._each("begin", *self._opening)
        self._each("log", row["step"], values)

    def flush(self) -> None:
        """Before a checkpoint."""
        if self._begun:
            self._each("flush")

    def close(self) -> None:
        """At the end of the session."""
        if self._begun:
            self._each("close")
        self._used.clear()

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in tuple(self._used):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._used.remove(tracker)
                _log.warning(
                    "the tracker %s failed in %s and is left out of this session: %s: %s. The run "
                    "goes on, and records.jsonl holds all numbers. Check the disk and the version "
                    "of its package; the next session tries it again.",
                    type(tracker).__name__,
                    method,
                    type(error).__name__,
                    error,
                )
