"""Optimisers that evaluate the loss themselves, by a closure: LBFGS, SAM and others.

    closure()  =  R + Omega of the batch of this step at the present weights, G in `.grad`

Each call computes the same objective: the same examples and the same random numbers.
"""

import inspect
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.optim import LBFGS

from anybatch.gradient import Gradient

__all__ = ["Closure", "needs_closure", "step_optimizer"]


def needs_closure(optimizer: Any) -> bool:
    """Return whether the `step` of an optimiser has no default for its closure."""
    kind: Any = type(optimizer)
    return _needs_closure(kind)


@lru_cache
def _needs_closure(kind: Hashable) -> bool:
    step: Any = getattr(kind, "step")  # noqa: B009
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def step_optimizer(optimizer: Any, closure: Callable[[], Tensor]) -> None:
    """Update the weights; pass the closure to an optimiser that needs it.

    Most optimisers accept a closure and would only evaluate the same loss again, so they get none.
    Some, such as common implementations of SAM, refuse to step without it, and say so.
    """
    if needs_closure(optimizer):
        optimizer.step(closure)
        return
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "closure" not in str(error):
            raise
        optimizer.step(closure)


class Closure:
    """Closure for the `step` of an optimiser; see the module.

    Args:
        gradient: of the batch at the present weights, whose `.grad` is in place.
        compute: computes it again at other weights.
        optimizer: LBFGS evaluates the present weights first, so its first call costs nothing.
    """

    def __init__(
        self, gradient: Gradient, compute: Callable[[], Gradient], optimizer: object
    ) -> None:
        self._first = gradient if type(optimizer) is LBFGS else None
        self._compute = compute

    def __call__(self) -> Tensor:
        gradient, self._first = self._first, None
        return (gradient or self._compute()).loss
