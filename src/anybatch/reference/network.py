"""Network: a sequence of layers, and their parameters.

    x_0 = x,   x_{l+1}, stored_l = forward_l(x_l),   error_l = backward_l(stored_l, error_{l+1})

l         index of a layer
stored_l  arrays of this example that its backward pass needs
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anybatch.reference.layers import Layer, Stored
from anybatch.reference.parameters import Array, Parameters, elementwise

__all__ = ["Network", "draw_parameters"]


@dataclass(frozen=True, slots=True)
class Network:
    """Layers and a copy of their parameters; an update makes another network.

    Args:
        layers: from input to output.
        parameters: one dictionary a layer, empty if it has none; float64, of the shapes of
            torch's `Linear` and `Conv2d`.

    Raises:
        ValueError: if a parameter is missing, unknown, or of another shape or type.
    """

    layers: Sequence[Layer]
    parameters: Parameters

    def __post_init__(self) -> None:
        expected = [
            {name: (shape, np.dtype(np.float64)) for name, shape in layer.shapes.items()}
            for layer in self.layers
        ]
        actual = [
            {name: (array.shape, array.dtype) for name, array in layer.items()}
            for layer in self.parameters
        ]
        if len(actual) != len(expected):
            raise ValueError(
                f"The network has {len(expected)} layers and {len(actual)} dictionaries of "
                f"parameters. Pass one for each layer, empty if it has no parameters."
            )
        for index, layer in enumerate(self.layers):
            if actual[index] != expected[index]:
                raise ValueError(
                    f"Layer {index}, {layer}, has the parameters {actual[index]}. It needs "
                    f"{expected[index]}. From a torch module pass "
                    f"parameter.detach().double().numpy()."
                )
        copies = elementwise(np.copy, self.parameters)  # arrays from torch share its memory
        object.__setattr__(self, "parameters", copies)

    def forward(self, x: Array) -> tuple[Array, list[Stored]]:
        """Pass one example through all layers.

        Args:
            x: the input of one example.

        Returns:
            The output, and the arrays that each layer stored.
        """
        stored: list[Stored] = []
        for layer, parameters in zip(self.layers, self.parameters, strict=True):
            x, arrays = layer.forward(x, parameters)
            stored.append(arrays)
        return x, stored

    def backward(self, stored: Sequence[Stored], error: Array) -> tuple[Array, Parameters]:
        """Pass the error of one example back through all layers.

        Args:
            stored: from the forward pass of the same example.
            error: dL/dy, of the shape of the output.

        Returns:
            dL/dx of the input, and the gradient of the parameters.
        """
        gradients: Parameters = []
        for layer, parameters, arrays in reversed(
            list(zip(self.layers, self.parameters, stored, strict=True))
        ):
            error, gradient = layer.backward(arrays, error, parameters)
            gradients.insert(0, gradient)
        return error, gradients


def draw_parameters(layers: Sequence[Layer], *, seed: int) -> Parameters:
    """Draw weights and biases uniformly from -1/sqrt(n) to 1/sqrt(n).

    n is the number of inputs of one output of the layer.

    Args:
        layers: of the network.
        seed: of NumPy's default generator.

    Returns:
        One dictionary a layer, float64.

    Source: the default of torch's `Linear` and `Conv2d`; the draws themselves differ.
    """
    generator = np.random.default_rng(seed)

    def draw(layer: Layer) -> dict[str, Array]:
        shapes = layer.shapes
        limit = 1 / np.sqrt(np.prod(shapes["weight"][1:])) if shapes else 0.0
        return {name: generator.uniform(-limit, limit, shape) for name, shape in shapes.items()}

    return [draw(layer) for layer in layers]
