r"""Text as a data set of next tokens: pieces of it, and the same pieces one token on.

    windows of T tokens    inputs[n, t] = token[nT + t],    targets[n, t] = token[nT + t + 1]
    ragged lines           inputs = \n a b c,    targets = a b c \n

A token is a byte, with the byte as its id, or a character, whose id is its place among the sorted
characters of the text. L tokens give N = floor((L - 1) / T) windows; the rest is not used. Lines
use every token: each is predicted from the end of the previous line up to its own.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import read_bytes, read_text
from anybatch.data.sequences import Sequences
from anybatch.errors import DataError

__all__ = ["Text", "check_unit", "decode", "encode", "load_lines", "load_text"]

BUILT_IN = "pydoc_topics"


class Text(Examples):
    """Inputs and targets [N, T] of int64 token ids, and the vocabulary."""

    vocabulary: bytes | str  # at place i the byte or the character with id i

    def to(self, dtype: torch.dtype) -> "Text":
        """Return the same data: token ids are not cast."""
        return self

    def decode(self, tokens: Iterable[int]) -> bytes | str:
        """Decode token ids to bytes or text."""
        return decode(tokens, self.vocabulary)


def load_text(path: str, unit: str = "bytes", length: int = 128) -> Text:
    """Load a text file, cut into windows of tokens.

    >>> from pathlib import Path
    >>> from anybatch.data import load_text
    >>> _ = Path("text.txt").write_text("to be or not to be")
    >>> text = load_text("text.txt", unit="characters", length=4)
    >>> text.decode(text.inputs[0]), text.decode(text.targets[0])
    ('to b', 'o be')

    Args:
        path: the file, or "pydoc_topics" for the help texts of Python itself, which differ a
            little between its versions.
        unit: "bytes" (256 ids, any file) or "characters" (UTF-8 only).
        length: T, tokens of a window.

    Raises:
        DataError: a file that is missing, shorter than a window and one token, or for characters
            not UTF-8.
    """
    tokens, vocabulary = encode(_read(path, unit))
    if not 1 <= length < len(tokens):
        raise DataError(
            f"{path} holds {len(tokens)} {unit} and data.args.length = {length}. It must be at "
            f"least 1 and less than that number: a window needs one token more, to predict."
        )
    num_windows = (len(tokens) - 1) // length
    inputs = tokens[: num_windows * length].reshape(num_windows, length)
    targets = tokens[1 : num_windows * length + 1].reshape(num_windows, length)
    text = Text.from_arrays(inputs, targets, tokens=True)
    text.vocabulary = vocabulary
    return text


def load_lines(path: str, unit: str = "bytes", length: int = 128) -> Sequences:
    """Load a text file, cut into its lines: ragged sequences with a target for each token.

    Args:
        path, unit: as for `load_text`.
        length: most tokens of a sequence; a longer line becomes several sequences.

    Raises:
        DataError: a file that is missing, empty, or for characters not UTF-8.
    """
    text = _read(path, unit)
    if length < 1 or not text:
        raise DataError(
            f"{path} holds {len(text)} {unit} and data.args.length = {length}. Both must be at "
            f"least 1."
        )
    tokens, vocabulary = encode(_enclose(text))
    last = len(tokens) - 1
    starts = np.flatnonzero(tokens[:last] == tokens[0])
    pieces = [np.arange(a, b, length) for a, b in pairwise([*starts, last])]
    offsets = np.concatenate([*pieces, [last]])
    return Sequences.from_arrays(
        (tokens[:-1], offsets),
        (tokens[1:], offsets),
        tokens=True,
        target_each_value=True,
        vocabulary=vocabulary,
    )


def check_unit(unit: str) -> None:
    """Refuse a unit that is neither "bytes" nor "characters", by a DataError."""
    if unit not in ("bytes", "characters"):
        raise DataError(f"data.args.unit = {unit!r}. It must be 'bytes' or 'characters'.")


def encode(text: bytes | str) -> tuple[NDArray[np.integer], bytes | str]:
    """Return token ids [L], and the vocabulary: at place i the byte or character with id i."""
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8), bytes(range(256))
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    distinct, tokens = np.unique(points, return_inverse=True)
    return tokens, "".join(map(chr, distinct.tolist()))


def decode(tokens: Iterable[int], vocabulary: bytes | str) -> bytes | str:
    """Return the bytes or the text of token ids."""
    if isinstance(vocabulary, bytes):
        return bytes(vocabulary[int(token)] for token in tokens)
    return "".join(vocabulary[int(token)] for token in tokens)


def _enclose(text: bytes | str) -> bytes | str:
    """Return the text with one line end before it, and one after it."""
    if isinstance(text, bytes):
        return b"\n" + text.removesuffix(b"\n") + b"\n"
    return "\n" + text.removesuffix("\n") + "\n"


def _read(path: str, unit: str) -> bytes | str:
    check_unit(unit)
    if path == BUILT_IN:
        return _read_topics().encode() if unit == "bytes" else _read_topics()
    if unit == "bytes":
        return read_bytes(path, "a text file")
    return read_text(path, "a text file", "Convert it (iconv), or set data.args.unit = 'bytes'.")


def _read_topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
