"""The type that a model's operations run in, beside that of its weights.

float32    as the weights and data are: no conversion
bfloat16   what torch's autocast lists, in bfloat16; gradients and updates as the weights are
float16    the same in float16, whose small gradients vanish unless the loss is scaled
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from anybatch.errors import ModelError

__all__ = ["Precision", "autocast", "check_precision"]

Precision = Literal["float32", "bfloat16", "float16"]

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """For the forward pass alone: its weights in narrower types are forgotten at the end."""
    if precision == "float32":
        return _AS_IT_IS
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def check_precision(precision: str) -> None:
    """See that there is such a precision.

    Raises:
        ModelError: there is none.
    """
    if precision not in get_args(Precision):
        raise ModelError(
            f"precision is {precision!r}, expected one of {', '.join(get_args(Precision))}. The "
            f"type of the weights is the model's own: model.double(), or run.dtype in a recipe."
        )
