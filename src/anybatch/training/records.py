"""The records of a run: one JSON object a line, in the order in which they were made.

    {"kind": "session", "step": t, ...}    begun or continued after t updates
    {"kind": "step", "step": t, ...}       update t, from 0
    {"kind": ..., "step": t, ...}          what the body of the loop noted of update t

Floats come back bit for bit; null stands for one that is not finite, which JSON cannot hold.
A last line without its end is what a crash cut off, and does not count.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from anybatch.errors import RunError
from anybatch.limits import read_json, shorten
from anybatch.training.checksums import Changing, State, no_checksums
from anybatch.training.disk import check_file, open_file, replace_file

__all__ = ["Records", "are_numbers", "read_recipe_records", "read_records"]

_encode = json.JSONEncoder(allow_nan=False).encode


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 2.0**1023)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def are_numbers(value: Any) -> bool:
    """Return whether a value of a row is an object of numbers, null for those not finite."""
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "step": {
        **dict.fromkeys(("step", "epoch", "examples"), _is_count),
        **dict.fromkeys(("loss", "lr", "seconds"), _is_number),
        **dict.fromkeys(("parts", "metrics", "averages"), are_numbers),
    },
    "evaluation": {
        "split": _is_text,
        "loss": _is_number,
        **dict.fromkeys(("parts", "metrics"), are_numbers),
    },
    "comparison": {"loss": _is_number},
    "stop": {"reason": _is_text},
}
"""Fields of the rows that the library itself writes for a recipe."""


class Records:
    """A records file, opened to append to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_file(path, "ab")
        self._written = _Sum()  # of all that was appended
        with open_file(path, "r+b") as file:  # what is appended must not join a torn line
            for line in file:
                if line.endswith(b"\n"):
                    self._written.add(line)
            file.truncate(self._written.num_bytes)
        self.state = self._written.state  # of what is on the disk for sure

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk after `flush`.

        Raises:
            RunError: a row without "kind" or "step", what is no plain JSON, or a closed run.
        """
        if not (isinstance(row.get("kind"), str) and isinstance(row.get("step"), int)):
            raise RunError(
                f"expected a row with a 'kind' (str) and the 'step' (int) that it belongs to, got "
                f"{row!r}. A resumed run drops the rows of steps that it makes again."
            )
        self._check_open()
        line = _line(row).encode()
        try:
            self._file.write(line)
            self._written.add(line)
        except OSError as error:
            raise self._refused(error) from error

    def flush(self) -> None:
        """Bring the rows to the disk.

        Raises:
            RunError: a disk that refuses, or a closed run.
        """
        self._check_open()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.state = self._written.state
        except OSError as error:
            raise self._refused(error) from error

    def drop_from(self, step: int, changing: Changing = no_checksums) -> dict[str, Any]:
        """Keep the rows of the updates before `step`, and those of all sessions.

        Args:
            step: the first update that is made again.
            changing: announces the new state of the file.

        Returns:
            The row of the last of these updates; empty if there is none.
        """
        self.flush()
        kept: list[bytes] = []
        last: dict[str, Any] = {}
        total = _Sum()
        for line, row in _lines(self._path):
            if row["kind"] == "session" or row["step"] < step:
                kept.append(line)
                total.add(line)
                last = row if row["kind"] == "step" else last
        try:
            with changing({self._path: total.state}):
                replace_file(self._path, kept)
        except OSError as error:
            raise self._refused(error) from error
        self._file.close()
        self._file = open_file(self._path, "ab")
        self._written, self.state = total, total.state
        return last

    def close(self) -> None:
        """Close the file; rows that a full disk does not take are lost."""
        with suppress(OSError, RunError):
            self.flush()
        with suppress(OSError):
            self._file.close()

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"could not write {self._path}: {error}. The checkpoints are untouched. Free some "
            f"space or check the disk, and resume."
        )

    def _check_open(self) -> None:
        if self._file.closed:
            raise RunError(
                f"the run of {self._path.parent} is closed, expected it open: its loop has ended. "
                f"Record and save in the body of the loop."
            )


class _Sum:
    """The state of a file that grows."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.num_bytes += len(data)
        self._sha256.update(data)

    @property
    def state(self) -> State:
        return self.num_bytes, self._sha256.hexdigest()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a records file; none where there is no file.

    Raises:
        RunError: a line that is no JSON object.
    """
    return [row for _, row in _lines(path)]


def read_recipe_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run that a recipe has made, with the fields of each row checked.

    A stranger may have written the file. Checksums do not tell.

    Raises:
        RunError: as `read_records`; a row without the fields that its kind has.
    """
    rows = read_records(path)
    for row in rows:
        for name, is_sound in _FIELDS.get(row["kind"], {}).items():
            if not is_sound(row.get(name)):
                raise RunError(
                    f"{path}: the {row['kind']} row of step {shorten(row['step'])} has "
                    f"{name} = {shorten(row.get(name))}, which anybatch does not write. Was the "
                    f"file edited, or made by another version? Restore it from a copy."
                )
    return rows


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line, and what it says."""
    check_file(path)
    if not path.exists():
        return
    with open_file(path, "rb") as file:
        for number, content in enumerate(file, 1):
            line = content.decode(errors="replace")
            if not line.endswith("\n"):
                return
            try:
                row = dict(read_json(line))
                _check_row(row)
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"{path}, line {number}: expected a JSON object with 'kind' and 'step', found "
                    f"{line[:60]!r} ({error}). Was the file edited, or damaged? Mend or remove "
                    f"that line."
                ) from error
            yield content, row


def _check_row(row: Mapping[str, Any]) -> None:
    if not (isinstance(row["kind"], str) and type(row["step"]) is int):
        raise ValueError("'kind' is no text, or 'step' no integer")


def _line(row: Mapping[str, Any]) -> str:
    try:
        try:
            return _encode(row) + "\n"
        except ValueError:
            return _encode(_finite(row)) + "\n"
    except TypeError as error:
        raise RunError(
            f"expected a row of plain JSON, got {row!r}: {error}. Convert it first (.item())."
        ) from error


def _finite(value: Any) -> Any:
    """The same with None for the numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
