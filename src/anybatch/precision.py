"""Precision of a model's operations, independent of the type of its weights.

float32    operations run in the type of the weights and data
bfloat16   autocast runs what it lists in bfloat16; gradients and updates have the weights' type
float16    the same in float16, whose small gradients vanish unless the loss is scaled
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from anybatch.errors import ModelError

__all__ = ["Precision", "autocast", "check_precision"]

Precision = Literal["float32", "bfloat16", "float16"]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Run a forward pass in a precision. At the end the narrow copies of weights are dropped."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def check_precision(precision: str) -> None:
    """Check the name of a precision."""
    if precision not in get_args(Precision):
        raise ModelError(
            f"precision is {precision!r}. It must be one of {', '.join(get_args(Precision))}. The "
            f"type of the weights is set elsewhere: by model.double(), or run.dtype in a recipe."
        )
