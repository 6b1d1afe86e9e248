"""Where gradients are taken on their way back.

Forward a tap passes its tensor on; backward it hands the gradient, with what was saved, to
whoever waits for it. What is saved goes through autograd's own means, so that activation
checkpointing sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "tapped"]

Arrive = Callable[..., None]


def tapped(output: Tensor, arrive: Arrive, *saved: Tensor) -> Tensor:
    """The output itself; `arrive(d, *saved)` is called once its gradient d is known."""
    if not torch.is_grad_enabled():
        return output
    tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
        output, _anchor(output), arrive, *saved
    )
    return tapped


def copied(constant: Tensor, shape: tuple[int, ...], arrive: Arrive) -> Tensor:
    """A constant broadcast to a shape; `arrive(d)` is called once its gradient is known."""
    copies = constant.expand(shape)
    if torch.is_grad_enabled():
        copies.requires_grad_()
        copies.register_hook(arrive)  # type: ignore[no-untyped-call]
    return copies


def _anchor(output: Tensor) -> Tensor:
    """What makes a graph where nothing before requires one."""
    return torch.empty(0, device=output.device, requires_grad=True)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, arrive: Arrive, *saved: Tensor) -> Tensor:
        ctx.arrive = arrive
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)  # so that what follows may change it in place, as before
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        saved = ctx.saved_tensors
        ctx.arrive(d, *(tensor.detach() for tensor in saved))
        return (d, None, None, *(None for _ in saved))
