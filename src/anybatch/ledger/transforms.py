"""Models that are called inside transforms of torch.func, such as grad, jacrev, jvp and vmap, or
with dual numbers of forward-mode differentiation.

A transform wraps the tensors that it works on, but not the parameters that a model holds itself.
Copies of these are made outside of it, so that a backward pass through the loss reaches them.
"""

from collections.abc import Iterable

from torch import Tensor

from anybatch._torch import are_transforms_active, forward_mode_level, functorch, leave_transforms
from anybatch.ledger.taps import SecondDerivative
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["check_transforms", "outside_transforms"]

outside_transforms = leave_transforms
"""A context in which new tensors are not wrapped."""


def check_transforms(operation: object, data: Iterable[Tensor], *, by_copies: bool) -> None:
    """Refuse an operation inside a transform, unless examples are seen and parameters are copies.

    Args:
        operation: for the message.
        data: its operands that are no parameters.
        by_copies: whether each example meets copies of the parameters.

    Raises:
        LedgerError: the operation is mapped over a dimension, which may be that of the examples.
        SecondDerivative: parameters would be constants.
    """
    is_transformed = are_transforms_active()
    if not is_transformed and forward_mode_level() < 0:
        return
    if any(map(_is_mapped, data)):
        raise UnplacedError(
            f"The {operation} is called inside torch.func.vmap, which hides the dimension of the "
            f"examples from the ledger. Call the model on the whole batch outside of vmap, or "
            f"leave it unobserved."
        )
    if not by_copies:
        how = "a transform of torch.func" if is_transformed else "forward-mode differentiation"
        raise SecondDerivative(how)


def _is_mapped(tensor: Tensor) -> bool:
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
