"""Examples in a form to look at: an image, a text, or the first numbers.

image    inputs [C, H, W] of 1 or 3 channels, or [H, W]:  8 bits a pixel, from the lowest value of
         the batch to the highest, the mean of k x k pixels if a side has more than 64
text     integers, or `Padded` ones: token ids, decoded if the vocabulary is known
numbers  anything else that is a tensor, with the names of the features of a table
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch._torch import tree_leaves
from anybatch.batch import Padded
from anybatch.data.text import decode
from anybatch.report.packing import pack

__all__ = ["Labels", "describe_inputs"]

SIDE = 64  # pixels of an image, at most
LETTERS = 400  # of a text, at most
NUMBERS = 6  # of an example that is neither
FEATURES = 24  # of an example whose features have names


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Names that belong to the data: of classes, features and letters."""

    names: Sequence[str] = ()  # of the classes, in their order
    features: Sequence[str] = ()  # of the inputs of a table, in their order
    vocabulary: bytes | str | None = None  # at place i the byte or the character with id i
    classes: Tensor | None = None  # [B], of the examples of the batch
    predicted: Tensor | None = None  # [B], by the weights before the update

    def name_classes(self, targets: Tensor | None) -> list[str] | None:
        """Name some classes; by their numbers if they have no names."""
        if targets is None:
            return None
        names = self.names
        return [names[i] if 0 <= i < len(names) else str(i) for i in targets.tolist()]


def describe_inputs(inputs: Any, labels: Labels) -> dict[str, Any] | None:
    """Convert inputs [B, ...] to images or texts; None if there is no tensor among them.

    Args:
        inputs: arguments of the model.
        labels: names of letters and features.
    """
    vocabulary = labels.vocabulary
    if isinstance(inputs, Padded):
        rows = [row[mask] for row, mask in zip(inputs.values, inputs.mask, strict=True)]
        return (
            _describe_texts(rows, vocabulary)
            if not inputs.values.is_floating_point()
            else _describe_numbers(rows)
        )
    leaf = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), None)
    if leaf is None:
        return None
    leaf = leaf.detach().cpu()
    if not leaf.is_floating_point():
        return _describe_texts(list(leaf.reshape(len(leaf), -1)), vocabulary)
    if leaf.ndim == 3 and min(leaf.shape[1:]) > 1:
        leaf = leaf[:, None]
    if leaf.ndim == 4 and leaf.shape[1] in (1, 3):
        return _describe_images(leaf)
    rows = list(leaf.reshape(len(leaf), -1))
    if len(labels.features) == len(rows[0]):
        return _describe_features(rows, labels.features)
    return _describe_numbers(rows)


def _describe_images(x: Tensor) -> dict[str, Any]:
    size, factor = list(x.shape[2:]), -(-max(x.shape[2:]) // SIDE)
    if factor > 1:
        x = F.avg_pool2d(x.float(), factor, ceil_mode=True)
    low, high = float(x.min()), float(x.max())
    levels = ((x - low) / ((high - low) or 1.0) * 255).round().to(torch.uint8)
    return {
        "kind": "images",
        "pixels": pack(levels.permute(0, 2, 3, 1)),  # [B, H, W, C]
        "size": size,  # before averaging
    }


def _describe_texts(rows: Sequence[Tensor], vocabulary: bytes | str | None) -> dict[str, Any]:
    return {"kind": "texts", "texts": [_decode_text(row.tolist(), vocabulary) for row in rows]}


def _decode_text(tokens: list[int], vocabulary: bytes | str | None) -> str:
    if vocabulary is None or not all(0 <= token < len(vocabulary) for token in tokens):
        return _shorten(" ".join(map(str, tokens)))
    text = decode(tokens, vocabulary)
    return _shorten(text.decode(errors="replace") if isinstance(text, bytes) else text)


def _describe_numbers(rows: Sequence[Tensor]) -> dict[str, Any]:
    texts = [", ".join(map(_format, row.flatten()[:NUMBERS].tolist())) for row in rows]
    more = any(row.numel() > NUMBERS for row in rows)
    return {"kind": "texts", "texts": [f"({text}{', …' if more else ''})" for text in texts]}


def _describe_features(rows: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Name each number: "age 0.8 · bmi −1.2"."""
    first, more = names[:FEATURES], "\u00a0· …" if len(names) > FEATURES else ""
    texts = [
        "\u00a0· ".join(
            f"{name}\u00a0{_format(x)}"
            for name, x in zip(first, row[:FEATURES].tolist(), strict=True)
        )
        for row in rows
    ]
    return {"kind": "texts", "texts": [text + more for text in texts]}


def _format(x: float) -> str:
    """Format a number with three digits and a minus that does not break a line: "−1.2"."""
    return f"{x:.3g}".replace("-", "−")


def _shorten(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} …"
