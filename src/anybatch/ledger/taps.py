"""Where gradients are taken on their way back.

Forward a tap passes its tensor on; backward it hands the gradient, with what was saved, to
whoever waits for it. What is saved goes through autograd's own means, so that activation
checkpointing sees it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anybatch._torch import leave_transforms
from anybatch.errors import LedgerError

__all__ = ["SecondDerivative", "copied", "refuse_second_derivative", "tapped"]

Arrive = Callable[..., None]


class SecondDerivative(LedgerError):
    """A gradient that is to be differentiated, past an operation whose parameters are constants.

    Args:
        how: the call that differentiates.
    """

    def __init__(self, how: str) -> None:
        super().__init__(
            f"The loss differentiates a gradient: {how} goes through an operation that the ledger "
            f"watches. Such a model has to be watched in another way from its forward pass on. "
            f"Take the step again, which does so, or leave the model unobserved."
        )


def refuse_second_derivative() -> None:
    """Refuse a backward pass that builds a graph; call it in the backward of a Function.

    The parameters that the operation met are constants of that graph, so that the gradient of a
    gradient would lack whatever comes through them. Autograd enables gradients in a backward pass
    exactly when it was begun with create_graph=True.

    Raises:
        SecondDerivative: this backward pass builds a graph.
    """
    if torch.is_grad_enabled():
        raise SecondDerivative("a backward pass with create_graph=True")


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
    with leave_transforms():  # torch.func would wrap what is made inside it
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
        refuse_second_derivative()
        saved = ctx.saved_tensors
        ctx.arrive(d, *(tensor.detach() for tensor in saved))
        return (d, None, None, *(None for _ in saved))
