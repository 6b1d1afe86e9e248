"""Read data files, whole or line by line; refuse other kinds of files."""

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
    "make_column_error",
    "open_bytes",
    "read_at_most",
    "read_bytes",
    "read_lines",
    "read_text",
]

MAX_LINE = 2**24  # characters
GZIP = b"\x1f\x8b"
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive (an Excel sheet is one, too)",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file",
}
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its prefix
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SECONDS = 2.0  # between two lines of progress

_log = logging.getLogger(__name__)


def read_bytes(path: str | Path, kind: str) -> bytes:
    """Read the bytes of a file.

    Args:
        path: the file; a relative path starts at the current folder.
        kind: its kind, for messages, such as "an IDX file".
    """
    with _translate_errors(path, kind):
        return Path(path).read_bytes()


def read_text(path: str | Path, kind: str, remedy: str) -> str:
    """Read text in UTF-8, or UTF-16 with a byte order mark; line ends stay as they are.

    Args:
        path, kind: as in `read_bytes`.
        remedy: advice for a file in another encoding.

    Raises:
        DataError: it cannot be read, or is no such text; the message names the first wrong byte.
    """
    content = read_bytes(path, kind)
    encoding = _detect_encoding(content[:4])
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _make_encoding_error(path, content, error.start, 0, line, encoding, remedy) from error


def read_lines(path: str | Path, kind: str, remedy: str) -> Iterator[str]:
    """Read the lines of a text file, plain or gzipped, with their ends, one at a time.

    Progress is logged if reading takes long.

    Args:
        path, kind, remedy: as in `read_text`.

    Raises:
        DataError: as `read_text`; a file that is damaged or compressed in another way, a line of
            more than `MAX_LINE` characters, or more bytes than `limits` allow.
    """
    with open_bytes(path, kind) as (file, raw):
        encoding = _detect_encoding(file.peek(4)[:4])
        lines, number = TextIOWrapper(file, encoding, newline=""), 0
        size, due = Path(path).stat().st_size, time.monotonic() + SECONDS
        try:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
                if len(line) == MAX_LINE:
                    raise DataError(
                        f"{path}, line {number} has more than {MAX_LINE:,} characters. Lines of a "
                        f"table are shorter: is the file damaged?"
                    )
                yield line
                if not number % 1000 and time.monotonic() > due:
                    _log.warning("reading %s: %.0f %%", path, 100 * raw.tell() / max(size, 1))
                    due = time.monotonic() + SECONDS
        except UnicodeDecodeError as error:
            raise _find_wrong_byte(path, kind, encoding, remedy) from error


@contextmanager
def open_bytes(path: str | Path, kind: str) -> Iterator[tuple[Any, IO[bytes]]]:
    """Open a file and unpack gzip; yield the content, and the file on disk.

    Raises:
        DataError: it cannot be read or unpacked, or is compressed in another way.
    """
    with _translate_errors(path, kind), Path(path).open("rb") as raw:
        head = raw.peek()
        for magic, other in OTHER_KINDS.items():
            if head.startswith(magic):
                raise DataError(
                    f"{path} is {other}. It should be {kind}, plain or gzipped. Unpack or convert "
                    f"it first."
                )
        if not head.startswith(GZIP):
            yield raw, raw
            return
        with _Unpacked(path, raw) as unpacked:
            yield unpacked, raw


def read_at_most(file: IO[bytes], num_bytes: int) -> bytearray:
    """Read at most this many bytes; memory is taken only for those that exist."""
    content = bytearray()
    while len(content) < num_bytes:
        piece = file.read(min(2**24, num_bytes - len(content)))
        if not piece:
            break
        content += piece
    return content


class _Unpacked(gzip.GzipFile):
    """Content of a gzip file, which may not unpack to more than `limits` allow."""

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
def _translate_errors(path: str | Path, kind: str) -> Iterator[None]:
    """Turn an error of reading a file into a DataError that names the file."""
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
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). It should be "
            f"{kind}. A relative path starts at the current folder."
        ) from error


def _detect_encoding(head: bytes) -> str:
    """Detect the encoding by the first bytes; without a mark UTF-8, or UTF-16 by its zeros."""
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    if head[1:2] == b"\0" and head[:1] != b"\0":
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" and head[1:2] not in (b"", b"\0") else "utf-8"


def _find_wrong_byte(path: str | Path, kind: str, encoding: str, remedy: str) -> DataError:
    """Make the error for the first byte of a file that is wrong in its encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line = 0, 1
    with open_bytes(path, kind) as (file, _):
        while piece := file.read1(2**20):
            rest = decoder.getstate()[0]  # of a character that the last piece cut
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                content, start = rest + piece, error.start
                line += content.count(b"\n", 0, start)
                return _make_encoding_error(
                    path, content, start, offset - len(rest), line, encoding, remedy
                )
            offset, line = offset + len(piece), line + piece.count(b"\n")
    return _make_encoding_error(path, b"", 0, offset, line, encoding, remedy)


def _make_encoding_error(
    path: str | Path, content: bytes, start: int, offset: int, line: int, encoding: str, remedy: str
) -> DataError:
    if start >= len(content):
        return DataError(
            f"{path}: the text ends within a character, after {offset + len(content)} bytes. Is "
            f"the file cut off?"
        )
    place = f"byte {offset + start} (counted from 0, in line {line}) is 0x{content[start]:02x}"
    name = encoding.upper().removesuffix("-SIG").removesuffix("-LE").removesuffix("-BE")
    return DataError(
        f"{path}: {place}, which is not valid {name}. Is it in another encoding, such as Latin-1, "
        f"or no text at all? {remedy}"
    )


def make_column_error(path: str | Path, name: str, names: Iterable[str]) -> DataError:
    """Make the error for a column that does not exist; it names the nearest that does."""
    names = list(names)
    folded = {other.casefold(): other for other in names}
    near = [folded[other] for other in get_close_matches(name.casefold(), folded, n=1)]
    return DataError(
        f"{path} has no column {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" It has: {', '.join(map(repr, names))}."
        + (" Is the delimiter another one?" if len(names) == 1 else "")
    )
