"""Limits on untrusted files: what is read of them, and what is shown.

A named pipe has no end, deep nesting overflows the stack, a few bytes can unpack into terabytes,
and a name can contain sequences that control a terminal. Each is refused, or shown as an escape.
"""

import json
import math
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anybatch.errors import AnybatchError

__all__ = [
    "DEPTH",
    "UNPACKED_BYTES",
    "check_depth",
    "check_files",
    "check_integers",
    "check_parquet",
    "check_unpacked",
    "escape_controls",
    "max_processes",
    "max_unpacked_bytes",
    "name_kind",
    "read_json",
    "replace_non_finite",
    "shorten",
]

DEPTH = 64
"""Levels of nested tables, objects and lists at most."""

UNPACKED_BYTES = 2**32
"""Bytes that any packed file may unpack into."""

_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a file"),
)
_TIMES_PACKED = 100  # a larger file may unpack into so many times its own bytes
_ALLOWED = "\n\t\u200c\u200d"  # the last two join letters, in Persian for instance
_CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph ends


def escape_controls(text: str) -> str:
    """Replace each character that could control a terminal by an escape, such as \\x1b."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(_escape(letter) for letter in text)


def _escape(letter: str) -> str:
    if letter in _ALLOWED or unicodedata.category(letter) not in _CONTROLS:
        return letter
    return letter.encode("unicode_escape").decode()


def shorten(value: object, letters: int = 200) -> str:
    """Return the repr of a value, cut off after some letters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= letters else f"{text[:letters]}..."


def max_processes() -> int:
    """Return the maximum number of threads or processes that may be started."""
    return max(64, 4 * (os.cpu_count() or 1))


def name_kind(mode: int) -> str:
    """Name the kind of a path's target: a file, a folder, a link, a named pipe, ..."""
    return next(name for is_kind, name in _KINDS if is_kind(mode))


def check_files(path: str | Path, error: type[AnybatchError]) -> None:
    """Check that a file, or each file below a folder, is no named pipe, device or socket.

    Links are followed: a file that is only read may lie elsewhere. In a run it may not; see
    `runs.disk`.

    Raises:
        AnybatchError: one of them is; reading it might never end.
    """
    path = Path(path)
    for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
        try:
            mode = os.stat(file).st_mode
        except (OSError, ValueError):
            continue  # reading it raises a better error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise error(
                f"{file} is {name_kind(mode)}. It must be a plain file: reading another kind might "
                f"never end. Copy its content into a file."
            )


def max_unpacked_bytes(packed: int) -> int:
    """Return how many bytes a file of `packed` bytes may unpack into."""
    return max(UNPACKED_BYTES, _TIMES_PACKED * packed)


def check_unpacked(
    path: str | Path, packed: int, unpacked: int, error: type[AnybatchError]
) -> None:
    """Check that a packed file does not unpack into more than memory is likely to hold.

    Args:
        packed, unpacked: bytes of the file, and of what is in it.
    """
    limit = max_unpacked_bytes(packed)
    if unpacked > limit:
        raise error(
            f"{path} holds {packed} bytes that unpack into {unpacked} or more. The limit is "
            f"{limit}. If the file is sound, unpack it yourself, and name what is in it."
        )


def check_parquet(path: str | Path, metadata: Any, error: type[AnybatchError]) -> None:
    """Check that a Parquet file does not unpack into too much: one value can stand for millions.

    Args:
        metadata: of the file, as pyarrow reads it.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    # A value for each row and column: what a list holds is known from `group.column(i)` alone,
    # by which a damaged file ends the process.
    values = metadata.num_rows * metadata.num_columns
    unpacked = max(sum(group.total_byte_size for group in groups), 8 * values)
    check_unpacked(path, os.stat(path).st_size, unpacked, error)


def read_json(content: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: no JSON, a key twice in an object, NaN, or nested deeper than `DEPTH`.
    """
    try:
        value = json.loads(content, object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    if not check_depth(value):
        raise ValueError(f"it is nested deeper than {DEPTH} levels")
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} stands twice in one object")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def replace_non_finite(value: Any) -> Any:
    """Replace numbers that JSON cannot hold, infinities and NaN, by None in nested values."""
    if isinstance(value, Mapping):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_depth(value: Any) -> bool:
    """Return whether nested dicts and lists have at most `DEPTH` levels."""
    return all(depth <= DEPTH for depth, _, _ in _iterate_nodes(value))


def check_integers(value: Any) -> str | None:
    """Find an integer beyond 64 bits in nested dicts and lists; return its place, or None."""
    for _, place, node in _iterate_nodes(value):
        if isinstance(node, int) and not -(2**63) <= node <= 2**64:  # a seed has 64 bits
            return place
    return None


def _iterate_nodes(value: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield each value of nested dicts and lists, with its depth and place; none below `DEPTH`."""
    waiting = [(0, "", value)]
    while waiting:
        depth, place, node = waiting.pop()
        yield depth, place, node
        inner: Iterable[tuple[Any, Any]] = node.items() if isinstance(node, dict) else ()
        inner = enumerate(node) if isinstance(node, list) else inner
        if depth <= DEPTH:
            waiting += [(depth + 1, f"{place}.{key}" if place else str(key), x) for key, x in inner]
