"""Optimisers that evaluate the loss themselves, by a closure: LBFGS, SAM and others.

    closure()  =  R + Omega of the batch of this step at the present weights, G in `.grad`

Each call computes the same objective: the same examples and the same random numbers.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import LBFGS

from anybatch.errors import DivergenceError
from anybatch.gradient import Gradient

__all__ = ["Closure", "needs_closure"]


def needs_closure(optimizer: Any) -> bool:
    """Return whether the `step` of an optimiser has no default for its closure.

    Most optimisers accept a closure and would only evaluate the same loss again, so they get none.
    Some, such as common implementations of SAM, have a default, and refuse to step without it.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class Closure:
    """Closure for the `step` of an optimiser; see the module.

    A gradient that is not finite stops the training: the optimiser is in the middle of its step, so
    the update cannot be skipped.

    Args:
        gradient: of the batch at the present weights, whose `.grad` is in place.
        compute: computes it again at other weights.
        optimizer: LBFGS evaluates the present weights first, so its first call costs nothing.
    """

    def __init__(
        self, gradient: Gradient, compute: Callable[[], Gradient], optimizer: object
    ) -> None:
        self._first = gradient if type(optimizer) is LBFGS else None
        self._compute, self._name = compute, type(optimizer).__name__

    def __call__(self) -> Tensor:
        gradient, self._first = self._first, None
        gradient = gradient or self._compute()
        if not gradient.is_finite:
            raise DivergenceError(
                f"{self._name} has moved the weights to where the gradient is not finite. Lower "
                f"its learning rate, or look for a derivative that is infinite (sqrt or log at 0)."
            )
        return gradient.loss
