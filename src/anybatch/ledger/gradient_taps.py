"""Taps: they hand gradients to the ledger on the backward pass.

    y = tap(f(x, constants), receive, *saved)       receive(dL/dy, *saved) in the backward pass

A tap returns its tensor unchanged. Autograd stores what the tap saves, so that activation
checkpointing sees it. Inside a transform of `torch.func` (grad, jacrev, jvp, vmap) torch wraps the
tensors of the transform, but not the parameters that a model holds. Copies of parameters are made
outside of it, so that the backward pass from the loss reaches them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from anybatch._torch import (
    DisableTorchFunction,
    are_transforms_active,
    forward_mode_level,
    functorch,
    leave_transforms,
)
from anybatch.errors import LedgerError
from anybatch.ledger.unplaced import UnplacedError

__all__ = [
    "SecondDerivative",
    "check_transforms",
    "copy_constant",
    "refuse_second_derivative",
    "tap",
]


class SecondDerivative(LedgerError):
    """Error for a loss that differentiates a gradient, in operations with constants.

    Args:
        how: the call that differentiates.
    """

    def __init__(self, how: str) -> None:
        super().__init__(
            f"The loss differentiates a gradient: {how} goes through an operation that the ledger "
            f"watches. The ledger must watch such a model in another way from its forward pass on. "
            f"Take the step again, which does so, or leave the model unobserved."
        )


def refuse_second_derivative() -> None:
    """Refuse a backward pass that builds a graph; call it in the backward of a Function.

    The parameters of the operation are constants of that graph, so the gradient of a gradient would
    miss a part. Autograd enables gradients in a backward pass if `create_graph=True`.

    Raises:
        SecondDerivative: this backward pass builds a graph.
    """
    if torch.is_grad_enabled():
        raise SecondDerivative("a backward pass with create_graph=True")


def tap(output: Tensor, receive: Callable[..., None], *saved: Tensor) -> Tensor:
    """Return the output; `receive(d, *saved)` gets its gradient d in the backward pass."""
    if not torch.is_grad_enabled():
        return output
    # The empty tensor makes a graph even if the output has none.
    anchor = torch.empty(0, device=output.device, requires_grad=True)
    result: Tensor = _Tap.apply(output, anchor, receive, *saved)  # type: ignore[no-untyped-call]
    return result


def copy_constant(
    constant: Tensor, shape: tuple[int, ...], receive: Callable[[Tensor], None]
) -> Tensor:
    """Broadcast a constant to a shape; `receive(d)` gets the gradient of the result."""
    with leave_transforms():  # torch.func would wrap new tensors inside it
        copies = constant.expand(shape)
        if torch.is_grad_enabled():
            copies.requires_grad_()
            copies.register_hook(receive)  # type: ignore[no-untyped-call]
    return copies


def check_transforms(operation: object, data: Iterable[Tensor], *, has_copies: bool) -> None:
    """Refuse an operation inside a transform if the ledger cannot see examples or parameters.

    Args:
        operation: for the message.
        data: its operands that are no parameters.
        has_copies: whether each example has its own copies of the parameters.

    Raises:
        UnplacedError: `vmap` hides a dimension, which can be that of the examples.
        SecondDerivative: the parameters would be constants.
    """
    is_transformed = are_transforms_active()
    if not is_transformed and forward_mode_level() < 0:
        return
    if any(map(_is_batched, data)):
        raise UnplacedError(
            f"The {operation} is called inside torch.func.vmap, which hides the dimension of the "
            f"examples from the ledger. Call the model on the whole batch outside of vmap, or "
            f"leave it unobserved."
        )
    if not has_copies:
        raise SecondDerivative(
            "a transform of torch.func" if is_transformed else "forward-mode differentiation"
        )


def _is_batched(tensor: Tensor) -> bool:
    """Return whether `vmap` hides a dimension of a tensor."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, receive: Callable[..., None], *saved: Tensor
    ) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)  # lets later operations change the output in place
        return output

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        refuse_second_derivative()
        saved = ctx.saved_tensors  # checkpointing runs forward again in here, seen by modes
        with DisableTorchFunction():
            ctx.receive(d, *(tensor.detach() for tensor in saved))
        return (d, None, None, *[None] * len(saved))
