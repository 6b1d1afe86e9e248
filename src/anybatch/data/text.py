"""Text as a data set of next tokens: windows of T tokens, and the same windows one token on.

    inputs[n, t] = token[nT + t],    targets[n, t] = token[nT + t + 1],    N = floor((L - 1) / T)

L is the length of the text in tokens; what is left at its end is not used. A token is a byte, its
id the byte itself, or a character, its id the place among the sorted characters of the text.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from anybatch.data.arrays import Examples
from anybatch.data.files import content_of, text_of
from anybatch.errors import DataError

__all__ = ["Text", "load_text"]

BUILT_IN = "pydoc_topics"


class Text(Examples):
    """Inputs and targets [N, T] of int64 token ids, and what each id stands for."""

    vocabulary: bytes | str  # at place i the byte or the character with id i

    def spelt(self, tokens: Iterable[int]) -> bytes | str:
        """The bytes or the text that token ids stand for."""
        if isinstance(self.vocabulary, bytes):
            return bytes(self.vocabulary[int(token)] for token in tokens)
        return "".join(self.vocabulary[int(token)] for token in tokens)


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
    if unit not in ("bytes", "characters"):
        raise DataError(f"data.args.unit = {unit!r}, expected 'bytes' or 'characters'.")
    tokens, vocabulary = _bytes(path) if unit == "bytes" else _characters(path)
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


def _bytes(path: str) -> tuple[NDArray[np.uint8], bytes]:
    content = _topics().encode() if path == BUILT_IN else content_of(path, "a text file")
    return np.frombuffer(content, np.uint8), bytes(range(256))


def _characters(path: str) -> tuple[NDArray[np.int64], str]:
    remedy = "Convert it (iconv), or take data.args.unit = 'bytes'."
    text = _topics() if path == BUILT_IN else text_of(path, "a text file", remedy)
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    distinct, tokens = np.unique(points, return_inverse=True)
    return tokens, "".join(map(chr, distinct.tolist()))


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
