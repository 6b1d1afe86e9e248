"""Records of a run: a file with one JSON object per line, in time order.

    {"kind": "session", "step": t, ...}    the run began or continued after t updates
    {"kind": "step", "step": t, ...}       update t, from 0
    {"kind": ..., "step": t, ...}          what the body of the loop recorded at update t

Floats come back bit for bit. null stands for a number that is not finite, which JSON cannot hold.
A last line without a line end was cut off by a crash, and does not count.

Moving averages of the loss and its parts make smooth curves:

    a <- s a + (1 - s) x,    a = x for the first x;    s the smoothing
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from anybatch.errors import RunError
from anybatch.limits import read_json, replace_non_finite, shorten
from anybatch.runs.checksums import AnnounceChanges, State, ignore_changes
from anybatch.runs.disk import check_file, flush_file, make_disk_error, open_file, replace_file

__all__ = ["Records", "are_numbers", "read_recipe_records", "read_records", "smooth_averages"]

_BATCH = 64  # rows of updates that are formatted together
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


def _are_examples(value: Any) -> bool:
    """Return whether a value lists examples of a spike."""
    return isinstance(value, list) and all(
        isinstance(example, dict)
        and _is_count(example.get("id"))
        and all(_is_number(example.get(name)) for name in ("loss", "norm", "share"))
        and isinstance(example.get("findings"), list)
        and all(map(_is_text, example["findings"]))
        for example in value
    )


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
    "spike": {
        "step": _is_count,
        "signal": lambda value: value in ("loss", "norm", "example"),
        **dict.fromkeys(("value", "median", "limit"), _is_number),
        "examples": _are_examples,
    },
}
"""Fields of the rows that the library itself writes for a recipe."""


class Records:
    """Records file of a run, open for appending."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_file(path, "ab")
        self._total = _RunningState()  # of all rows so far
        with open_file(path, "r+b") as file:  # cut a torn last line, so that no row joins it
            for line in file:
                if line.endswith(b"\n"):
                    self._total.add(line)
            file.truncate(self._total.num_bytes)
        self.state = self._total.state  # of the rows that are certainly on the disk
        self._waiting: list[Mapping[str, Any]] = []  # rows of updates that are not formatted yet

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk after `flush`.

        Raises:
            RunError: the row has no "kind" or "step", it is no plain JSON, or the run is closed.
        """
        if not (isinstance(row.get("kind"), str) and isinstance(row.get("step"), int)):
            raise RunError(
                f"the row {row!r} has no 'kind' (str) or no 'step' (int). A row needs both: a "
                f"resumed run drops the rows of steps that it makes again."
            )
        self._check_open()
        self._write_waiting()
        self._write(_format_line(row))

    def append_later(self, row: Mapping[str, Any]) -> None:
        """Append a row that nobody changes any more: formatting many at once takes less time.

        Raises:
            RunError: a row is no plain JSON, or the run is closed.
        """
        self._check_open()
        self._waiting.append(row)
        if len(self._waiting) >= _BATCH:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the rows that wait; if one is no plain JSON, those before it."""
        rows, self._waiting = self._waiting, []
        lines: list[str] = []
        try:
            lines.extend(map(_format_line, rows))
        finally:
            self._write("".join(lines))

    def _write(self, lines: str) -> None:
        content = lines.encode()
        try:
            self._file.write(content)
            self._total.add(content)
        except OSError as error:
            raise make_disk_error(self._path, error) from error

    def flush(self) -> None:
        """Flush the rows to the disk.

        Raises:
            RunError: the disk refuses, or the run is closed.
        """
        self._check_open()
        self._write_waiting()
        try:
            flush_file(self._file)
            self.state = self._total.state
        except OSError as error:
            raise make_disk_error(self._path, error) from error

    def drop_from(self, step: int, announce: AnnounceChanges = ignore_changes) -> dict[str, Any]:
        """Drop the rows of this update and all later ones; rows of sessions stay.

        Args:
            step: the first update that is made again.
            announce: gets the new state of the file.

        Returns:
            The row of the last update that stays; empty if there is none.
        """
        self.flush()
        lines: list[bytes] = []
        last: dict[str, Any] = {}
        total = _RunningState()
        for line, row in _read_lines(self._path):
            if row["kind"] == "session" or row["step"] < step:
                lines.append(line)
                total.add(line)
                last = row if row["kind"] == "step" else last
        try:
            with announce({self._path: total.state}):
                replace_file(self._path, lines)
        except OSError as error:
            raise make_disk_error(self._path, error) from error
        self._file.close()
        self._file = open_file(self._path, "ab")
        self._total, self.state = total, total.state
        return last

    def close(self) -> None:
        """Close the file; rows that do not fit on a full disk are lost."""
        with suppress(OSError, RunError):
            self.flush()
        with suppress(OSError):
            self._file.close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise RunError(
                f"the run of {self._path.parent} is closed, because its loop has ended. Record "
                f"and save in the body of the loop."
            )


class _RunningState:
    """Size and SHA-256 of a growing file."""

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
    """Read the rows of a records file; without a file there are none.

    Raises:
        RunError: a line is no JSON object.
    """
    return [row for _, row in _read_lines(path)]


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


def smooth_averages(
    averages: Mapping[str, float], values: Mapping[str, float | None], smoothing: float
) -> dict[str, float]:
    """Update moving averages by one value each.

    Args:
        averages: before the update, by name.
        values: by name; a value that is missing or not finite leaves its average unchanged.
        smoothing: s, from 0 (the values themselves) to under 1.

    Source: the CIFAR-10 tutorial of TensorFlow logs each loss raw and as such an average, s = 0.9.
    """
    after = dict(averages)
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            before = after.get(name)
            after[name] = value if before is None else smoothing * before + (1 - smoothing) * value
    return after


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each whole line with its row."""
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
                if not (isinstance(row["kind"], str) and type(row["step"]) is int):
                    raise ValueError("'kind' is no text, or 'step' no integer")
            except (ValueError, TypeError, KeyError) as error:
                raise RunError(
                    f"{path}, line {number}: {line[:60]!r} is no JSON object with 'kind' and "
                    f"'step' ({error}). Was the file edited, or damaged? Mend or remove that line."
                ) from error
            yield content, row


def _format_line(row: Mapping[str, Any]) -> str:
    try:
        try:
            return _encode(row) + "\n"
        except ValueError:
            return _encode(replace_non_finite(row)) + "\n"
    except TypeError as error:
        raise RunError(
            f"the row {row!r} is no plain JSON: {error}. Convert it first (.item())."
        ) from error
