"""Files that hold data: read whole, or refused with what was expected there."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from anybatch.errors import DataError
from anybatch.limits import check_files

__all__ = ["content_of", "missing_column", "text_of"]


def content_of(path: str | Path, kind: str) -> bytes:
    """The bytes of a file.

    Args:
        path: the file; a relative one is looked up from the current folder.
        kind: what it should be, such as "an IDX file".

    Raises:
        DataError: it cannot be read.
    """
    check_files(path, DataError)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}), expected "
            f"{kind}. A relative path is looked up from the folder that you are in."
        ) from error


def text_of(path: str | Path, kind: str, remedy: str) -> str:
    """The text of a UTF-8 file, its line ends as they are.

    Args:
        path, kind: as in `content_of`.
        remedy: what to do with a file in another encoding.

    Raises:
        DataError: it cannot be read, or is not UTF-8; the first offending byte is named.
    """
    content = content_of(path, kind)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: byte {error.start} (counted from 0, in line {line}) is "
            f"0x{content[error.start]:02x}, expected UTF-8 text. Is it in another encoding, such "
            f"as Latin-1, or no text at all? {remedy}"
        ) from error


def missing_column(path: str | Path, name: str, names: Iterable[str]) -> DataError:
    """The error for a column that is not there, which names the nearest that is."""
    known = list(names)
    near = get_close_matches(name, known, n=1)
    return DataError(
        f"{path} has no column {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" It has: {', '.join(map(repr, known))}."
        + (" Is the delimiter another one?" if len(known) == 1 else "")
    )
