"""A network: layers, one after the other, and their parameters.

    x_0 = x,   x_{l+1}, stored_l = forward_l(x_l),   error_l = backward_l(stored_l, error_{l+1})

l   the index of a layer; stored_l  what it keeps of this example for the way back
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anybatch.reference.layers import Layer, Stored
from anybatch.reference.parameters import Array, Parameters, elementwise

__all__ = ["Network", "initial_parameters"]


@dataclass(frozen=True, slots=True)
class Network:
    """Layers and a copy of their parameters: an update makes another network.

    Args:
        layers: in the order in which an example passes them.
        parameters: one dictionary a layer, empty where a layer has none; float64, of the shapes
            of torch's `Linear` and `Conv2d`.

    Raises:
        ValueError: if a parameter is missing, not expected, or of another shape or type.
    """

    layers: Sequence[Layer]
    parameters: Parameters

    def __post_init__(self) -> None:
        expected = [
            {name: (shape, np.dtype(np.float64)) for name, shape in layer.shapes.items()}
            for layer in self.layers
        ]
        got = [
            {name: (array.shape, array.dtype) for name, array in layer.items()}
            for layer in self.parameters
        ]
        if len(got) != len(expected):
            raise ValueError(
                f"{len(expected)} layers expected {len(expected)} dictionaries of parameters, got "
                f"{len(got)}. Give an empty dictionary for each layer that has no parameters."
            )
        for index, layer in enumerate(self.layers):
            if got[index] != expected[index]:
                raise ValueError(
                    f"Layer {index}, {layer}, expected the parameters {expected[index]}, got "
                    f"{got[index]}. From a torch module take parameter.detach().double().numpy()."
                )
        own = elementwise(np.copy, self.parameters)  # what comes from torch shares its memory
        object.__setattr__(self, "parameters", own)

    def forward(self, x: Array) -> tuple[Array, list[Stored]]:
        """Pass one example through all layers.

        Args:
            x: the input of one example.

        Returns:
            The output, and what each layer stored of this example.
        """
        stored: list[Stored] = []
        for layer, parameters in zip(self.layers, self.parameters, strict=True):
            x, kept = layer.forward(x, parameters)
            stored.append(kept)
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
        for layer, parameters, kept in reversed(
            list(zip(self.layers, self.parameters, stored, strict=True))
        ):
            error, gradient = layer.backward(kept, error, parameters)
            gradients.insert(0, gradient)
        return error, gradients


def initial_parameters(layers: Sequence[Layer], *, seed: int) -> Parameters:
    """Draw weights and biases uniformly from -1/sqrt(n) to 1/sqrt(n).

    n is the number of inputs that one output of the layer sees.

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
        bound = 1 / np.sqrt(np.prod(shapes["weight"][1:])) if shapes else 0.0
        return {name: generator.uniform(-bound, bound, shape) for name, shape in shapes.items()}

    return [draw(layer) for layer in layers]
