"""What a tracker is, and the numbers that it is given.

row of the records -> {"loss": 0.5, "parts/data": 0.4, ...} at a step
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, final, runtime_checkable

from anybatch.errors import RunError
from anybatch.extras import needed
from anybatch.limits import printable

__all__ = ["Tracker", "Trackers", "imported", "numbers"]


@runtime_checkable
class Tracker(Protocol):
    """Shows the numbers of a run; any object with these methods is one."""

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Called once a session, before its first `log`.

        Args:
            folder: of the run; what is written belongs below it.
            step: updates made in earlier sessions, by the checkpoint that this one continues.
                What was logged at this step and later ones is made again.
            settings: of the run, as plain JSON.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the finite numbers of one row by name; a step may have several rows."""

    def flush(self) -> None:
        """Called before a checkpoint: what was logged so far is not made again after it."""

    def close(self) -> None:
        """The session is over; nothing is called after it."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row by name; those of a session are none.

    A step's are named as in the row, those of an evaluation begin with its split, and those of
    other rows with their kind.
    """
    if row["kind"] == "session":
        return {}
    prefix = "" if row["kind"] == "step" else f"{row.get('split', row['kind'])}/"
    return dict(_flat(prefix, {name: row[name] for name in row if name != "step"}))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}/", value)
        elif type(value) in (int, float) and math.isfinite(value):
            yield printable(prefix + name), float(value)


def imported(extra: str, *modules: str) -> list[ModuleType]:
    """Modules of packages that only a tracker needs.

    Raises:
        RunError: one that cannot be imported.
    """
    what = f"the records hold all numbers, and the tracker {extra!r} shows them by a package"
    return [needed(name, f"anybatch[{extra}]", what, RunError) for name in modules]


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
