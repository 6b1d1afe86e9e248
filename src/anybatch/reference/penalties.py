"""Penalties on the parameters, added once an update.

    L2(a):  Omega = (a / 2) * sum of w^2,   gradient a w
    L1(a):  Omega = a * sum of |w|,         gradient a sign(w), 0 at w = 0

a   the strength
w   each number of the parameters that the penalty applies to

`on` is patterns of names such as "0.weight"; by default all weights and no biases.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np

from anybatch.reference.parameters import Parameters, elementwise, flatten, name_arrays

__all__ = ["L1", "L2", "Both", "Penalty"]

Patterns: TypeAlias = tuple[str, ...]


class Penalty(ABC):
    """A function of the parameters alone; penalties add with `+`."""

    __slots__ = ()

    @abstractmethod
    def value(self, parameters: Parameters) -> float:
        """Compute Omega(w)."""

    @abstractmethod
    def gradient(self, parameters: Parameters) -> Parameters:
        """Compute the gradient of Omega: zeros for other parameters."""

    def __add__(self, other: "Penalty") -> "Penalty":
        return Both(self, other)


@dataclass(frozen=True, slots=True)
class L2(Penalty):
    """(strength / 2) * sum of w^2: `weight_decay` of torch's SGD."""

    strength: float
    on: Patterns = ("*.weight",)

    def value(self, parameters: Parameters) -> float:
        return self.strength / 2 * float(np.sum(flatten(select(parameters, self.on)) ** 2))

    def gradient(self, parameters: Parameters) -> Parameters:
        return elementwise(lambda w: self.strength * w, select(parameters, self.on))


@dataclass(frozen=True, slots=True)
class L1(Penalty):
    """strength * sum of |w|."""

    strength: float
    on: Patterns = ("*.weight",)

    def value(self, parameters: Parameters) -> float:
        return self.strength * float(np.sum(np.abs(flatten(select(parameters, self.on)))))

    def gradient(self, parameters: Parameters) -> Parameters:
        return elementwise(lambda w: self.strength * np.sign(w), select(parameters, self.on))


@dataclass(frozen=True, slots=True)
class Both(Penalty):
    """Sum of two penalties."""

    first: Penalty
    second: Penalty

    def value(self, parameters: Parameters) -> float:
        return self.first.value(parameters) + self.second.value(parameters)

    def gradient(self, parameters: Parameters) -> Parameters:
        return elementwise(
            np.add, self.first.gradient(parameters), self.second.gradient(parameters)
        )


def select(parameters: Parameters, patterns: Patterns) -> Parameters:
    """Return the parameters whose names match, and zeros for the others.

    Raises:
        ValueError: if a pattern matches no name.
    """
    names = list(name_arrays(parameters))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"The penalty's pattern {pattern!r} matches none of the parameters {names}. A "
                f"name is the index of the layer, a dot and the parameter, as in '0.weight'."
            )
    return [
        {
            name: w
            if any(fnmatchcase(f"{index}.{name}", p) for p in patterns)
            else np.zeros_like(w)
            for name, w in layer.items()
        }
        for index, layer in enumerate(parameters)
    ]
