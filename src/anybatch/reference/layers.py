"""Layers that one example passes at a time.

    forward:    y = f(x, w)
    backward:   error of x = (dy/dx)^T (error of y),   gradient of w = (dy/dw)^T (error of y)

x, y    the input and output of one example; there is no batch dimension
w       the parameters of the layer
error   the derivative of this example's loss with respect to an activation

A layer is a description and owns no numbers: the parameters come in, and what
backward needs of the forward pass comes out, one `stored` for each example.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anybatch.reference.parameters import Array

__all__ = ["Dense", "Flatten", "Layer", "ReLU", "Sigmoid", "Stored", "Tanh", "check_example"]

Stored: TypeAlias = dict[str, NDArray[Any]]


class Layer(Protocol):
    """What a network asks of a layer."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name."""
        ...

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        """Pass one example on.

        Args:
            x: the input, of this example alone.
            parameters: of this layer.

        Returns:
            The output, and what `backward` needs for this example.

        Raises:
            ValueError: if x has not the shape of one example.
        """
        ...

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Pass the error of one example back.

        Args:
            stored: from the forward pass of the same example.
            error: dL/dy, of the shape of the output.
            parameters: those of the forward pass.

        Returns:
            dL/dx, and dL/dw by name.
        """
        ...


def check_example(layer: Layer, x: Array, shape: tuple[int | None, ...]) -> None:
    """Refuse an input that has not the shape of one example.

    Args:
        layer: named in the message.
        x: the input.
        shape: expected; None stands for any size.

    Raises:
        ValueError: if the shapes differ.
    """
    fits = len(x.shape) == len(shape) and all(
        size is None or size == got for size, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{layer} expected one example of shape ({expected}), got {x.shape}. A layer has no "
            f"batch dimension: pass the examples one by one, and check the layer before this one."
        )


@dataclass(frozen=True, slots=True)
class Dense:
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
class ReLU:
    """y = max(x, 0): the error passes where x > 0. At x = 0 the derivative is taken as 0."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        return np.maximum(x, 0.0), {"passes": x > 0}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * stored["passes"], {}


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """y = 1 / (1 + exp(-x)): dy/dx = y (1 - y)."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        y = np.exp(-np.logaddexp(0.0, -x))  # the same function, without overflow
        return y, {"y": y}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * stored["y"] * (1.0 - stored["y"]), {}


@dataclass(frozen=True, slots=True)
class Tanh:
    """y = tanh x: dy/dx = 1 - y^2."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        y = np.tanh(x)
        return y, {"y": y}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error * (1.0 - stored["y"] ** 2), {}


@dataclass(frozen=True, slots=True)
class Flatten:
    """The numbers of one example in one vector, row-major."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        return x.ravel(), {"shape": np.array(x.shape)}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        return error.reshape(stored["shape"]), {}
