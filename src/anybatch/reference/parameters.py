"""Parameters: one dictionary of arrays a layer, and arithmetic on them.

    parameters[0]["weight"]   the weight of layer 0, of the shape that torch gives it

A gradient has the structure of its parameters, so the function `elementwise` computes every sum,
quotient and update.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Parameters", "add_up", "elementwise", "flatten", "name_arrays", "zeros_like"]

Array: TypeAlias = NDArray[np.float64]
Parameters: TypeAlias = list[dict[str, Array]]


def elementwise(function: Callable[..., Array], *operands: Parameters) -> Parameters:
    """Apply a function to the arrays that have the same layer and name.

    Args:
        function: takes one array of each operand.
        operands: parameters or gradients of one structure.

    Returns:
        The results, in that structure.
    """
    return [
        {name: function(*(layer[name] for layer in layers)) for name in layers[0]}
        for layers in zip(*operands, strict=True)
    ]


def add_up(terms: Iterable[Parameters]) -> Parameters:
    """Add gradients of one structure, from left to right.

    Args:
        terms: at least one.

    Returns:
        Their sum.
    """
    return reduce(lambda left, right: elementwise(np.add, left, right), terms)


def zeros_like(parameters: Parameters) -> Parameters:
    """Return zeros in the structure of the parameters."""
    return elementwise(np.zeros_like, parameters)


def name_arrays(parameters: Parameters) -> dict[str, Array]:
    """Return the arrays by name, such as "0.weight", as a torch Sequential names them."""
    return {
        f"{index}.{name}": array
        for index, layer in enumerate(parameters)
        for name, array in layer.items()
    }


def flatten(parameters: Parameters) -> Array:
    """Return all numbers in one vector, in the order of `name_arrays`, each array row-major."""
    return np.concatenate([array.ravel() for array in name_arrays(parameters).values()])
