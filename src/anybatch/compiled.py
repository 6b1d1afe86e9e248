"""Models that `torch.compile` has wrapped: their parameters have the names of the model itself."""

from typing import cast

from torch import nn

__all__ = ["unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """Take the module out of the wrapper of `torch.compile`; any other is returned as it is.

    Names then agree with those of the eager model, in patterns, settings and checkpoints.
    """
    return cast(nn.Module, getattr(model, "_orig_mod", model))
