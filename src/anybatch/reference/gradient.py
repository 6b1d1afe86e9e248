"""Gradient of a batch, computed example by example.

    g_i  =  grad L_i(w)                          forward and back, each example on its own
    G    =  (1/n) * sum over i of g_i  +  grad Omega(w)

L_i     loss of example i
n       B, the number of examples, for the mean; 1 for the sum
Omega   the penalty, added once

The derivative of a sum is the sum of the derivatives, so G is the gradient of the reduced loss.
Only gradients may be averaged, not losses, activations or errors: these pass through non-linear
functions, and the mean of a function is not the function of a mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from anybatch.reference.layers import Stored
from anybatch.reference.losses import Loss
from anybatch.reference.network import Network
from anybatch.reference.parameters import Array, Parameters, add_up, elementwise
from anybatch.reference.penalties import Penalty

__all__ = ["BatchGradient", "ExampleGradient", "Reduction", "batch_gradient", "example_gradient"]

Reduction: TypeAlias = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleGradient:
    """Loss and gradient of one example, and the state of each layer."""

    loss: float
    output: Array
    stored: list[Stored]  # by layer; that of a MaxPool2d holds its "winners"
    input_error: Array  # dL/dx
    gradients: Parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchGradient:
    """Gradient of one batch, and those of its examples."""

    loss: float  # reduced over the examples, penalty included
    parts: dict[str, float]  # "data" and "penalty", whose sum is the loss
    gradients: Parameters  # of the loss
    examples: tuple[ExampleGradient, ...]

    @property
    def example_losses(self) -> Array:
        """Losses of the examples [B], without penalty."""
        return np.array([example.loss for example in self.examples])

    @property
    def example_gradients(self) -> list[Parameters]:
        """Gradients of the examples, without penalty and not divided by B."""
        return [example.gradients for example in self.examples]


def example_gradient(network: Network, loss: Loss, x: Array, target: Any) -> ExampleGradient:
    """Compute the loss and gradient of one example.

    Args:
        network: its parameters are w.
        loss: of one example.
        x: the input, in the shape that the first layer takes.
        target: in the form that the loss takes.

    Returns:
        The loss, and its exact gradient up to float64 rounding.
    """
    output, stored = network.forward(np.asarray(x, dtype=np.float64))
    input_error, gradients = network.backward(stored, loss.error(output, target))
    return ExampleGradient(
        loss=loss.value(output, target),
        output=output,
        stored=stored,
        input_error=input_error,
        gradients=gradients,
    )


def batch_gradient(
    network: Network,
    loss: Loss,
    inputs: Sequence[Array] | Array,
    targets: Sequence[Any] | Array,
    *,
    reduction: Reduction = "mean",
    penalty: Penalty | None = None,
) -> BatchGradient:
    """Compute each example's gradient, sum them, divide, and add the penalty's gradient.

    >>> import numpy as np
    >>> from anybatch.reference import Dense, Network, SquaredError, batch_gradient
    >>> network = Network([Dense(1, 1, bias=False)], [{"weight": np.array([[2.0]])}])
    >>> gradient = batch_gradient(network, SquaredError(), [[1.0], [3.0]], [[1.0], [3.0]])
    >>> gradient.gradients[0]["weight"]  # the mean of 2 and 18
    array([[10.]])

    Args:
        network: its parameters are w.
        loss: of one example.
        inputs: one for each example.
        targets: one for each example.
        reduction: "mean" divides by the number of examples, "sum" does not divide.
        penalty: on the parameters; it does not depend on the reduction.

    Returns:
        The loss of the batch, its gradient, and the gradient of each example.

    Raises:
        ValueError: if the batch is empty, inputs and targets differ in number, or the reduction
            is unknown.
    """
    divisor = get_divisor(reduction, check_batch(inputs, targets))
    examples = tuple(
        example_gradient(network, loss, x, target)
        for x, target in zip(inputs, targets, strict=True)
    )
    data = sum(example.loss for example in examples) / divisor
    summed = add_up(example.gradients for example in examples)
    gradients = elementwise(lambda array: array / divisor, summed)
    if penalty is not None:
        gradients = elementwise(np.add, gradients, penalty.gradient(network.parameters))
    parts = {"data": data, "penalty": penalty.value(network.parameters) if penalty else 0.0}
    return BatchGradient(
        loss=sum(parts.values()), parts=parts, gradients=gradients, examples=examples
    )


def get_divisor(reduction: Reduction, batch_examples: int) -> int:
    """Return the divisor of the sum over the examples."""
    divisors = {"mean": batch_examples, "sum": 1}
    if reduction not in divisors:
        raise ValueError(
            f"reduction is {reduction!r}. It must be 'mean' or 'sum'. For other weights of the "
            f"examples add up `example_gradients` yourself."
        )
    return divisors[reduction]


def check_batch(inputs: Sequence[Array] | Array, targets: Sequence[Any] | Array) -> int:
    """Return the number of examples; refuse an empty batch, or one with other targets."""
    if len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            f"The batch has {len(inputs)} inputs and {len(targets)} targets. It must have at least "
            f"one example, and one target for each input. Cut both at the same places."
        )
    return len(inputs)
