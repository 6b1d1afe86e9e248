"""Unwrap models that `torch.compile` has wrapped."""

from typing import cast

from torch import nn

__all__ = ["WRAPPED", "unwrap"]

WRAPPED = "_orig_mod"
"""Name of the module inside the wrapper."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile`; any other module unchanged.

    Names then agree with those of the eager model, in patterns, settings and checkpoints.
    """
    return cast(nn.Module, getattr(model, WRAPPED, model))
