"""Text as token ids, and back.

A token is a byte, its id the byte itself, or a character, its id the place among the sorted
characters of the text.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from anybatch.errors import DataError

__all__ = ["check_unit", "encoded", "spelt"]


def check_unit(unit: str) -> None:
    """Refuse what is no kind of token.

    Raises:
        DataError: it is neither "bytes" nor "characters".
    """
    if unit not in ("bytes", "characters"):
        raise DataError(f"data.args.unit = {unit!r}, expected 'bytes' or 'characters'.")


def encoded(text: bytes | str) -> tuple[NDArray[np.integer], bytes | str]:
    """Token ids [L], and the vocabulary: at place i the byte or the character with id i."""
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8), bytes(range(256))
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    distinct, tokens = np.unique(points, return_inverse=True)
    return tokens, "".join(map(chr, distinct.tolist()))


def spelt(tokens: Iterable[int], vocabulary: bytes | str) -> bytes | str:
    """The bytes or the text that token ids stand for."""
    if isinstance(vocabulary, bytes):
        return bytes(vocabulary[int(token)] for token in tokens)
    return "".join(vocabulary[int(token)] for token in tokens)
