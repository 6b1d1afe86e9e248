"""What a tracker is, and the numbers that it is given.

row of the records -> {"loss": 0.5, "parts/data": 0.4, ...} at a step
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from anybatch.errors import RunError
from anybatch.extras import import_extra
from anybatch.limits import escape_controls

__all__ = ["Tracker", "imported", "numbers"]


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
            yield escape_controls(prefix + name), float(value)


def imported(extra: str, *modules: str) -> list[ModuleType]:
    """Modules of packages that only a tracker needs.

    Raises:
        RunError: one that cannot be imported.
    """
    what = f"the records hold all numbers, and the tracker {extra!r} shows them by a package"
    return [import_extra(name, f"anybatch[{extra}]", what, RunError) for name in modules]
