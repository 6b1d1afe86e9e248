"""Loss of one example, and its derivative.

    value = L(y, t),   error = dL/dy

y   the output of the network for this example
t   its target

A loss is that of one example. `gradient.py` reduces the losses of a batch.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anybatch.reference.parameters import Array

__all__ = ["Loss", "Output", "SoftmaxCrossEntropy", "SquaredError"]


class Loss(Protocol):
    """Interface of a loss."""

    def value(self, output: Array, target: Any) -> float:
        """Compute the loss of one example.

        Args:
            output: y, of this example alone.
            target: t, in the form that the loss takes.

        Returns:
            L, not averaged over anything.

        Raises:
            ValueError: if output and target do not fit each other.
        """
        ...

    def error(self, output: Array, target: Any) -> Array:
        """Compute dL/dy, of the shape of the output; `Args` and `Raises` as for `value`."""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxCrossEntropy:
    """L = log(sum over j of exp(y_j)) - y_t for a class t: dL/dy = softmax(y) - onehot(t)."""

    def value(self, output: Array, target: int) -> float:
        check_class(output, target)
        return float(np.logaddexp.reduce(output) - output[target])

    def error(self, output: Array, target: int) -> Array:
        check_class(output, target)
        softmax = np.exp(output - np.logaddexp.reduce(output))
        onehot = np.arange(len(output)) == target
        return np.asarray(softmax - onehot)


@dataclass(frozen=True, slots=True)
class SquaredError:
    """L = sum over the outputs j of (y_j - t_j)^2, without 1/2 or mean: dL/dy = 2 (y - t)."""

    def value(self, output: Array, target: Array) -> float:
        return float(np.sum(compute_residual(output, target) ** 2))

    def error(self, output: Array, target: Array) -> Array:
        return 2.0 * compute_residual(output, target)


@dataclass(frozen=True, slots=True)
class Output:
    """L = y, the single output of the network, which may be negative: dL/dy = 1."""

    def value(self, output: Array, target: None) -> float:
        if output.size != 1:
            raise ValueError(
                f"Output got an output of shape {output.shape}. It takes the single output of a "
                f"network as the loss. End the network in a layer with one output."
            )
        return float(output.item())

    def error(self, output: Array, target: None) -> Array:
        return np.ones_like(output)


def check_class(output: Array, target: int) -> None:
    """Refuse a target that is not a class of the output."""
    if (
        output.ndim != 1
        or not isinstance(target, int | np.integer)
        or not (0 <= target < len(output))
    ):
        raise ValueError(
            f"SoftmaxCrossEntropy got outputs of shape {output.shape} and target {target!r}. It "
            f"takes a vector of outputs and the number of a class, an integer from 0. Flatten "
            f"before the last layer, and pass classes as integers, not as one-hot vectors."
        )


def compute_residual(output: Array, target: Array) -> Array:
    """Compute y - t without broadcasting."""
    if np.shape(target) != output.shape:
        raise ValueError(
            f"SquaredError got a target of shape {np.shape(target)} and an output of shape "
            f"{output.shape}. They must be equal: broadcasting would compare every output with "
            f"every target. Reshape the targets to [examples, outputs]."
        )
    return output - target
