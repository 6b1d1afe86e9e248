"""Support for torch's GradScaler.

    scaler.step(optimizer)    .grad <- .grad / scale,  then optimizer.step()

So gradients must have been multiplied by the scale, as `batch_gradient(..., scaler=scaler)` does.
Without this argument the step would silently be `scale` times too short. It is refused.
"""

import sys
from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from anybatch.errors import ModelError

__all__ = ["note_unscaled", "read_scale"]

_MAX_FRAMES = 8  # between a scaler and the hook of an optimiser

# Gradients that were left in a model without being multiplied by a scale.
_unscaled: WeakKeyDictionary[nn.Module, list[ReferenceType[Tensor]]] = WeakKeyDictionary()


def read_scale(scaler: GradScaler, loss_scale: float, model: nn.Module) -> float:
    """Read the scale of a GradScaler.

    Raises:
        ModelError: another object, or a loss scale besides the scaler.
    """
    if not isinstance(scaler, GradScaler):
        raise ModelError(
            f"scaler is a {type(scaler).__name__}. It must be a torch.amp.GradScaler, or None."
        )
    if loss_scale != 1:
        raise ModelError("Both loss_scale and scaler were passed. Leave out loss_scale.")
    device = next(model.parameters()).device
    one = torch.ones((), dtype=torch.float32, device=device)
    return float(scaler.scale(one))


def note_unscaled(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Note that the gradients in a model are not multiplied by any scale."""
    _unscaled[model] = [ref(p.grad) for p in parameters if p.grad is not None]


def _refuse_scaler(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Refuse the step of a GradScaler if its gradients are not multiplied by a scale."""
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_code.co_filename == _FILE:
            break
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_filename != _FILE:
        return
    if not frame.f_locals["self"].is_enabled():  # a disabled scaler does not divide
        return
    unscaled = {
        id(g) for references in _unscaled.values() for r in references if (g := r()) is not None
    }
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    if any(id(g) in unscaled for g in gradients if g is not None):
        raise ModelError(
            "GradScaler.step() divides gradients by its scale, and those of batch_gradient are not "
            "multiplied by it: the step would be too short. Pass "
            "batch_gradient(..., scaler=scaler), or call optimizer.step() in place of "
            "scaler.step(optimizer)."
        )


_FILE = sys.modules[GradScaler.__module__].__file__
register_optimizer_step_pre_hook(_refuse_scaler)
