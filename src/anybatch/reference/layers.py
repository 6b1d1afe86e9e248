"""Layers, applied to one example at a time.

    forward:    y = f(x, w)
    backward:   error of x = (dy/dx)^T (error of y),   gradient of w = (dy/dw)^T (error of y)

x, y    the input and output of one example; there is no batch dimension
w       the parameters of the layer
error   the derivative of this example's loss with respect to an activation

A layer holds no numbers. It gets its parameters as an argument. Its forward pass returns what the
backward pass needs, one `stored` for each example.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anybatch.reference.parameters import Array

__all__ = ["Dense", "Flatten", "Layer", "ReLU", "Sigmoid", "Stored", "Tanh", "check_example"]

Stored: TypeAlias = dict[str, NDArray[Any]]


class Layer(ABC):
    """Interface of a layer."""

    __slots__ = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, by name; empty for a layer without parameters."""
        return {}

    @abstractmethod
    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        """Compute the output for one example.

        Args:
            x: the input, of this example alone.
            parameters: of this layer.

        Returns:
            The output, and the arrays that `backward` needs for this example.

        Raises:
            ValueError: if x does not have the shape of one example.
        """

    @abstractmethod
    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Compute the error of the input, and the gradients, for one example.

        Args:
            stored: from the forward pass of the same example.
            error: dL/dy, of the shape of the output.
            parameters: those of the forward pass.

        Returns:
            dL/dx, and dL/dw by name.
        """


def check_example(layer: Layer, x: Array, shape: tuple[int | None, ...]) -> None:
    """Refuse an input that does not have the shape of one example.

    Args:
        layer: named in the message.
        x: the input.
        shape: of one example; None is any size.

    Raises:
        ValueError: if the shapes differ.
    """
    fits = len(x.shape) == len(shape) and all(
        size is None or size == other for size, other in zip(shape, x.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{layer} got an input of shape {x.shape}. One example has shape ({sizes}). A layer "
            f"has no batch dimension: pass the examples one by one, and check the layer before it."
        )


@dataclass(frozen=True, slots=True)
class Dense(Layer):
    """y = W x + b, with W of [outputs, inputs]: dL/dx = W^T e, dL/dW = e x^T, dL/db = e."""

    inputs: int
    outputs: int
    bias: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        weight = {"weight": (self.outputs, self.inputs)}
        return weight | ({"bias": (self.outputs,)} if self.bias else {})

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        check_example(self, x, (self.inputs,))
        output = parameters["weight"] @ x
        return output + parameters["bias"] if self.bias else output, {"x": x}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        gradients = {"weight": np.outer(error, stored["x"])}
        if self.bias:
            gradients["bias"] = error
        return parameters["weight"].T @ error, gradients


@dataclass(frozen=True, slots=True)
class ReLU(Layer):
    """y = max(x, 0): the error passes where x > 0. At x = 0 the derivative is 0."""

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        return np.maximum(x, 0.0), {"passes": x > 0}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * stored["passes"], {}


@dataclass(frozen=True, slots=True)
class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)): dy/dx = y (1 - y)."""

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        y = np.exp(-np.logaddexp(0.0, -x))  # the same function, without overflow
        return y, {"y": y}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * stored["y"] * (1.0 - stored["y"]), {}


@dataclass(frozen=True, slots=True)
class Tanh(Layer):
    """y = tanh x: dy/dx = 1 - y^2."""

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        y = np.tanh(x)
        return y, {"y": y}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * (1.0 - stored["y"] ** 2), {}


@dataclass(frozen=True, slots=True)
class Flatten(Layer):
    """Flattening of one example into a vector, row-major."""

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        return x.ravel(), {"shape": np.array(x.shape)}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error.reshape(stored["shape"]), {}
