"""Files that hold data: read whole or line by line, or refused with what was expected there."""

import codecs
import gzip
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from anybatch.errors import DataError
from anybatch.limits import check_files, check_unpacked
from anybatch.paths import check_local

__all__ = [
    "GZIP",
    "content_of",
    "missing_column",
    "opened_bytes",
    "read_at_most",
    "text_lines",
    "text_of",
]

MOST_LINE = 2**24  # characters
GZIP = b"\x1f\x8b"
OTHERS = {
    b"PK\x03\x04": "a zip archive (an Excel sheet is one, too)",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PAR1": "a Parquet file",
}
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SECONDS = 2.0  # until the first line of progress, and between two

_log = logging.getLogger(__name__)


def content_of(path: str | Path, kind: str) -> bytes:
    """The bytes of a file.

    Args:
        path: the file; a relative one is looked up from the current folder.
        kind: what it should be, such as "an IDX file".

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path, kind):
        return Path(path).read_bytes()


def text_of(path: str | Path, kind: str, remedy: str) -> str:
    """The text of a file in UTF-8, or UTF-16 with its mark; line ends as they are.

    Args:
        path, kind: as in `content_of`.
        remedy: what to do with a file in another encoding.

    Raises:
        DataError: it cannot be read, or is no such text; the first offending byte is named.
    """
    content = content_of(path, kind)
    encoding = _encoding(content[:4])
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _no_text(path, content, error.start, 0, line, encoding, remedy) from error


def text_lines(path: str | Path, kind: str, remedy: str) -> Iterator[str]:
    """The lines of a text file, plain or gzipped, with their ends; one is held at a time.

    A file that takes long to read has its progress logged.

    Args:
        path, kind, remedy: as in `text_of`.

    Raises:
        DataError: as `text_of`; a file that is damaged or packed in another way, a line of more
            than `MOST_LINE` characters, or more bytes than `limits` allow.
    """
    with opened_bytes(path, kind) as (file, raw):
        encoding = _encoding(file.peek(4)[:4])
        lines, number = TextIOWrapper(file, encoding, newline=""), 0
        size, due = Path(path).stat().st_size, time.monotonic() + SECONDS
        try:
            for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE), ""), 1):
                if len(line) == MOST_LINE:
                    raise DataError(
                        f"{path}, line {number} has more than {MOST_LINE:,} characters. Lines of a "
                        f"table are shorter: is the file damaged?"
                    )
                yield line
                if not number % 1000 and time.monotonic() > due:
                    _log.warning("reading %s: %.0f %%", path, 100 * raw.tell() / max(size, 1))
                    due = time.monotonic() + SECONDS
        except UnicodeDecodeError as error:
            raise _undecodable(path, kind, encoding, remedy) from error


@contextmanager
def opened_bytes(path: str | Path, kind: str) -> Iterator[tuple[Any, IO[bytes]]]:
    """Open a file, unpacking gzip: the content, and the file as it lies on the disk.

    Raises:
        DataError: it cannot be read or unpacked, or is packed in another way.
    """
    with _readable(path, kind), Path(path).open("rb") as raw:
        head = raw.peek(8)[:8]
        for magic, what in OTHERS.items():
            if head.startswith(magic):
                raise DataError(
                    f"{path} is {what}. It should be {kind}, plain or gzipped. Unpack or convert "
                    f"it first."
                )
        if not head.startswith(GZIP):
            yield raw, raw
            return
        with _Unpacked(path, raw) as unpacked:
            yield unpacked, raw


def read_at_most(file: IO[bytes], num_bytes: int) -> bytearray:
    """Read up to so many bytes, without memory for more than there are."""
    content = bytearray()
    while len(content) < num_bytes:
        piece = file.read(min(2**24, num_bytes - len(content)))
        if not piece:
            break
        content += piece
    return content


class _Unpacked(gzip.GzipFile):
    """The content of a gzip file, which may not unpack to more than `limits` allow."""

    def __init__(self, path: str | Path, raw: IO[bytes]) -> None:
        super().__init__(fileobj=raw)
        self._path, self._packed = path, os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        self._check()
        return super().read(size)

    def read1(self, size: int = -1) -> bytes:
        self._check()
        return super().read1(size)

    def _check(self) -> None:
        check_unpacked(self._path, self._packed, self.tell(), DataError)


@contextmanager
def _readable(path: str | Path, kind: str) -> Iterator[None]:
    check_local(path, kind, DataError)
    check_files(path, DataError)
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is a gzip file that cannot be unpacked: {error}. Copy it again."
        ) from error
    except (UnicodeError, DataError):
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}), expected "
            f"{kind}. A relative path is looked up from the folder that you are in."
        ) from error


def _encoding(head: bytes) -> str:
    """The encoding of a text by its first bytes; without a mark UTF-8, or UTF-16 by its zeros."""
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    if head[1:2] == b"\0" and head[:1] != b"\0":
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" and head[1:2] not in (b"", b"\0") else "utf-8"


def _undecodable(path: str | Path, kind: str, encoding: str, remedy: str) -> DataError:
    """The error for the first byte of a file that its encoding does not know."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line = 0, 1
    with opened_bytes(path, kind) as (file, _):
        while piece := file.read1(2**20):
            held = decoder.getstate()[0]
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                content, start = held + piece, error.start
                line += content.count(b"\n", 0, start)
                return _no_text(path, content, start, offset - len(held), line, encoding, remedy)
            offset, line = offset + len(piece), line + piece.count(b"\n")
    return _no_text(path, b"", 0, offset, line, encoding, remedy)


def _no_text(
    path: str | Path,
    content: bytes,
    start: int,
    offset: int,
    line: int,
    encoding: str,
    remedy: str,
) -> DataError:
    if start >= len(content):
        what = f"{path}: the text ends within a character, after {offset + len(content)} bytes."
        return DataError(f"{what} Is the file cut off?")
    what = f"byte {offset + start} (counted from 0, in line {line}) is 0x{content[start]:02x}"
    name = encoding.upper().removesuffix("-SIG").removesuffix("-LE").removesuffix("-BE")
    return DataError(
        f"{path}: {what}, expected {name} text. Is it in another encoding, such "
        f"as Latin-1, or no text at all? {remedy}"
    )


def missing_column(path: str | Path, name: str, names: Iterable[str]) -> DataError:
    """The error for a column that is not there, which names the nearest that is."""
    known = list(names)
    folded = {one.casefold(): one for one in known}
    near = [folded[one] for one in get_close_matches(name.casefold(), folded, n=1)]
    return DataError(
        f"{path} has no column {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" It has: {', '.join(map(repr, known))}."
        + (" Is the delimiter another one?" if len(known) == 1 else "")
    )
