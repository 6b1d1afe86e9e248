"""Encode figures as text in a page: compact, and safe for any content.

    array  ->  {"dtype": "f4", "shape": [...], "data": base64 of its bytes, little-endian}

A number that is not finite is null on its own, and NaN or infinite in an array. The JSON in a page
has no `<`, `>` or `&`, so nothing in it can end its element or begin another. Characters beyond
ASCII, such as U+2028, are escaped.
"""

import base64
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anybatch.limits import replace_non_finite

__all__ = ["embed_json", "narrow", "pack"]

_CODES = {"f8", "f4", "f2", "u1", "u2", "i4"}
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def pack(values: Tensor | NDArray[Any]) -> dict[str, Any]:
    """Pack an array for JSON; integers in the narrowest type that holds them all."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind in "iub":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        narrow = np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.int32
        array = array.astype(narrow if low >= 0 else np.int32)
    code = f"{array.dtype.kind}{array.dtype.itemsize}"
    assert code in _CODES, f"no page reads {array.dtype}"
    content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": code,
        "shape": list(array.shape),
        "data": base64.b64encode(content).decode("ascii"),
    }


def embed_json(value: Any) -> str:
    """Return JSON that is safe inside an element of a page."""

    def convert(number: Tensor | np.generic) -> Any:
        return replace_non_finite(number.item())

    text = json.dumps(
        replace_non_finite(value), allow_nan=False, separators=(",", ":"), default=convert
    )
    return text.translate(_ESCAPES)


def narrow(values: Tensor) -> Tensor:
    """Convert floats to float32, except float64."""
    return values if values.dtype == torch.float64 else values.float()
