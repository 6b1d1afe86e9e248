r"""Text as a data set of next tokens: pieces of it, and the same pieces one token on.

    windows of T tokens    inputs[n, t] = token[nT + t],    targets[n, t] = token[nT + t + 1]
    ragged lines           inputs = \n a b c,    targets = a b c \n

There are N = floor((L - 1) / T) windows in L tokens; what is left at the end is not used. Lines
use every token: each is predicted from the end of the line before it up to its own.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch

from anybatch.data.arrays import Examples
from anybatch.data.files import content_of, text_of
from anybatch.data.sequences import Sequences
from anybatch.data.tokens import check_unit, encoded, spelt
from anybatch.errors import DataError

__all__ = ["Text", "load_lines", "load_text"]

BUILT_IN = "pydoc_topics"


class Text(Examples):
    """Inputs and targets [N, T] of int64 token ids, and what each id stands for."""

    vocabulary: bytes | str  # at place i the byte or the character with id i

    def to(self, dtype: torch.dtype) -> "Text":
        """Return the same: token ids are no floats to cast."""
        return self

    def spelt(self, tokens: Iterable[int]) -> bytes | str:
        """The bytes or the text that token ids stand for."""
        return spelt(tokens, self.vocabulary)


def load_text(path: str, unit: str = "bytes", length: int = 128) -> Text:
    """A text file cut into windows of tokens.

    Args:
        path: the file, or "pydoc_topics" for the help texts that Python itself brings, which
            differ a little from version to version of it.
        unit: "bytes" (256 ids, any file) or "characters" (UTF-8 alone).
        length: T, tokens of a window.

    Raises:
        DataError: a file that is missing, shorter than a window and one token, or for characters
            not UTF-8.
    """
    tokens, vocabulary = encoded(_content(path, unit))
    if not 1 <= length < len(tokens):
        raise DataError(
            f"{path} holds {len(tokens)} {unit} and data.args.length = {length}, expected windows "
            f"of at least 1 and fewer than there are: each needs one token more, to predict."
        )
    num_windows = (len(tokens) - 1) // length
    inputs = tokens[: num_windows * length].reshape(num_windows, length)
    targets = tokens[1 : num_windows * length + 1].reshape(num_windows, length)
    found = Text.of(inputs, targets, tokens=True)
    found.vocabulary = vocabulary
    return found


def load_lines(path: str, unit: str = "bytes", length: int = 128) -> Sequences:
    """A text file cut into its lines: ragged sequences with a target for each token.

    Args:
        path, unit: as for `load_text`.
        length: tokens of a line at most; a longer one goes on as a further sequence.

    Raises:
        DataError: a file that is missing, empty, or for characters not UTF-8.
    """
    text = _content(path, unit)
    if length < 1 or not text:
        raise DataError(
            f"{path} holds {len(text)} {unit} and data.args.length = {length}, expected at least "
            f"1 of both."
        )
    tokens, vocabulary = encoded(_between_ends(text))
    last = len(tokens) - 1
    begins = np.flatnonzero(tokens[:last] == tokens[0])
    pieces = [np.arange(a, b, length) for a, b in pairwise([*begins, last])]
    offsets = np.concatenate([*pieces, [last]])
    return Sequences.of(
        (tokens[:-1], offsets),
        (tokens[1:], offsets),
        tokens=True,
        target_each_value=True,
        vocabulary=vocabulary,
    )


def _between_ends(text: bytes | str) -> bytes | str:
    """The text with one end of a line before it, and one after it."""
    if isinstance(text, bytes):
        return b"\n" + text.removesuffix(b"\n") + b"\n"
    return "\n" + text.removesuffix("\n") + "\n"


def _content(path: str, unit: str) -> bytes | str:
    check_unit(unit)
    if path == BUILT_IN:
        return _topics().encode() if unit == "bytes" else _topics()
    if unit == "bytes":
        return content_of(path, "a text file")
    return text_of(path, "a text file", "Convert it (iconv), or take data.args.unit = 'bytes'.")


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
