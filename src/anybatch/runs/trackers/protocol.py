"""Define what a tracker is, and pass the numbers of a run to all trackers.

row of the records -> {"loss": 0.5, "parts/data": 0.4, ...} at a step
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, final, runtime_checkable

from anybatch.errors import RunError
from anybatch.extras import import_extra
from anybatch.limits import escape_controls

__all__ = ["Tracker", "Trackers", "import_modules", "list_numbers"]

_log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Shows the numbers of a run; any object with these methods is a tracker."""

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Begin a session; called once, before its first `log`.

        Args:
            folder: of the run; the tracker writes only below it.
            step: updates before this session, up to the checkpoint that it continues. Everything
                logged at this step and later ones is made again.
            settings: of the run, as plain JSON.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the finite numbers of one row by name; a step may have several rows."""

    def flush(self) -> None:
        """Write everything so far; called before a checkpoint."""

    def close(self) -> None:
        """End the session; nothing is called afterwards."""


@final
class Trackers:
    """All trackers of a run. One that fails is logged, and not called again in this session.

    They begin at the first row after an update, so that a session without updates leaves nothing.

    Raises:
        RunError: an object is no tracker.
    """

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)
        for tracker in self._trackers:
            if not isinstance(tracker, Tracker) or isinstance(tracker, type):
                raise RunError(
                    f"trackers holds {tracker!r}. A tracker is an object with begin, log, flush "
                    f"and close. For a name, use tracker_named('tensorboard')."
                )
        self._arguments: tuple[Path, int, Mapping[str, Any]] | None = None  # of `begin`
        self._has_begun = False

    @property
    def places(self) -> list[str]:
        """Files and folders of a run that the trackers are known to write."""
        return [place for tracker in self._trackers for place in getattr(tracker, "places", ())]

    def begin(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Store the arguments of `Tracker.begin` until the first row."""
        self._arguments = folder, step, settings

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row, if it has any."""
        if not self._trackers or self._arguments is None or not (values := list_numbers(row)):
            return
        if not self._has_begun:
            self._has_begun = True
            self._call("begin", *self._arguments)
        self._call("log", row["step"], values)

    def flush(self) -> None:
        """Flush all trackers, before a checkpoint."""
        if self._has_begun:
            self._call("flush")

    def close(self) -> None:
        """Close all trackers, at the end of the session."""
        if self._has_begun:
            self._call("close")
        self._trackers.clear()

    def _call(self, method: str, *arguments: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._trackers.remove(tracker)
                _log.warning(
                    "the tracker %s failed in %s and is left out of this session: %s: %s. The run "
                    "goes on, and records.jsonl holds all numbers. Check the disk and the version "
                    "of its package; the next session tries it again.",
                    type(tracker).__name__,
                    method,
                    type(error).__name__,
                    error,
                )


def list_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """List the finite numbers of a row by name; a row of a session has none.

    The names of a step are those in the row. Names of an evaluation begin with its split, and names
    of other rows with their kind.
    """
    if row["kind"] == "session":
        return {}
    prefix = "" if row["kind"] == "step" else f"{row.get('split', row['kind'])}/"
    return dict(_flatten(prefix, {name: row[name] for name in row if name != "step"}))


def _flatten(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}{name}/", value)
        elif type(value) in (int, float) and math.isfinite(value):
            yield escape_controls(prefix + name), float(value)


def import_modules(extra: str, *modules: str) -> list[ModuleType]:
    """Import modules of the package that a tracker needs."""
    what = f"the records hold all numbers, and the tracker {extra!r} shows them by a package"
    return [import_extra(name, f"anybatch[{extra}]", what, RunError) for name in modules]
