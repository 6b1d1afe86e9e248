"""The loss of one example, and the error it sends back.

    value = L(y, t),   error = dL/dy

y   the output of the network for this example
t   its target

A loss is of one example: what a batch does with its losses is not decided here.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anybatch.reference.parameters import Array

__all__ = ["Loss", "Output", "SoftmaxCrossEntropy", "SquaredError"]


class Loss(Protocol):
    """What a gradient asks of a loss."""

    def value(self, output: Array, target: Any) -> float:
        """The loss of one example.

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
        """dL/dy, of the shape of the output; `Args` and `Raises` as for `value`."""
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
        return float(np.sum(residual(output, target) ** 2))

    def error(self, output: Array, target: Array) -> Array:
        return 2.0 * residual(output, target)


@dataclass(frozen=True, slots=True)
class Output:
    """L = y, the single output of the network, which may be negative: dL/dy = 1."""

    def value(self, output: Array, target: None) -> float:
        if output.size != 1:
            raise ValueError(
                f"Output takes the one output of a network as its loss, got an output of shape "
                f"{output.shape}. End the network in a layer with one output."
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
            f"SoftmaxCrossEntropy expected one vector of outputs and an integer class from 0 to "
            f"their number less 1, got outputs of shape {output.shape} and target {target!r}. "
            f"Flatten before the last layer; give classes as integers, not as one-hot vectors."
        )


def residual(output: Array, target: Array) -> Array:
    """y - t, and no broadcasting."""
    if np.shape(target) != output.shape:
        raise ValueError(
            f"SquaredError expected a target of shape {output.shape}, that of the output, got "
            f"{np.shape(target)}. Broadcasting would compare every output with every target: "
            f"reshape the targets to [examples, outputs]."
        )
    return output - target
