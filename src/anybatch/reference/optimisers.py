"""Optimisers: one update from one gradient, in the definitions of torch.

    SGD        w <- w - lr g
    Momentum   v <- m v + g;      w <- w - lr v
    Nesterov   v <- m v + g;      w <- w - lr (g + m v)
    Adagrad    s <- s + g^2;      w <- w - lr g / (sqrt(s) + eps)
    RMSProp    s <- a s + (1 - a) g^2;      w <- w - lr g / (sqrt(s) + eps)
    Adam       u <- b1 u + (1 - b1) g;      s <- b2 s + (1 - b2) g^2
               w <- w - lr u / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps)
    AdamW      w <- (1 - lr d) w, then Adam

w, g       parameters, and the gradient of the batch's loss, penalty included
v, u, s    state: velocity, mean of gradients, mean (Adagrad: sum) of their squares; 0 at first
m, a, b    decay of the state;   d  decay of the weights;   t  number of the update, from 1

An optimiser holds no numbers but its settings. An update takes the state and returns the next one.
To change the learning rate during training, replace `lr` and keep the state.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from anybatch.reference.parameters import Array, Parameters, elementwise, zeros_like

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Moments",
    "Momentum",
    "Nesterov",
    "Optimiser",
    "RMSProp",
]

State = TypeVar("State")


class Optimiser(Protocol[State]):
    """Interface of an optimiser."""

    def start(self, parameters: Parameters) -> State:
        """Return the state before the first update."""
        ...

    def update(
        self, state: State, gradient: Parameters, parameters: Parameters
    ) -> tuple[State, Parameters]:
        """Apply one gradient.

        Args:
            state: from `start` or the previous update.
            gradient: in the structure of the parameters.
            parameters: left as they are.

        Returns:
            The new state and the new parameters.
        """
        ...


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent."""

    lr: float

    def start(self, parameters: Parameters) -> None:
        return None

    def update(
        self, state: None, gradient: Parameters, parameters: Parameters
    ) -> tuple[None, Parameters]:
        return None, elementwise(lambda w, g: w - self.lr * g, parameters, gradient)


@dataclass(frozen=True, slots=True)
class Momentum:
    """SGD along a velocity.

    Source: torch.optim.SGD(momentum=m), dampening 0. Caffe's state is lr v: the same updates as
    long as lr is constant.
    """

    lr: float
    momentum: float = 0.9

    def start(self, parameters: Parameters) -> Parameters:
        return zeros_like(parameters)

    def update(
        self, state: Parameters, gradient: Parameters, parameters: Parameters
    ) -> tuple[Parameters, Parameters]:
        velocity = elementwise(lambda v, g: self.momentum * v + g, state, gradient)
        return velocity, elementwise(lambda w, v: w - self.lr * v, parameters, velocity)


@dataclass(frozen=True, slots=True)
class Nesterov:
    """SGD along the velocity that the next update would have.

    Source: torch.optim.SGD(momentum=m, nesterov=True).
    """

    lr: float
    momentum: float = 0.9

    def start(self, parameters: Parameters) -> Parameters:
        return zeros_like(parameters)

    def update(
        self, state: Parameters, gradient: Parameters, parameters: Parameters
    ) -> tuple[Parameters, Parameters]:
        velocity = elementwise(lambda v, g: self.momentum * v + g, state, gradient)

        def step(w: Array, g: Array, v: Array) -> Array:
            return w - self.lr * (g + self.momentum * v)

        return velocity, elementwise(step, parameters, gradient, velocity)


@dataclass(frozen=True, slots=True)
class Adagrad:
    """Learning rate for each number, falling with the sum of its squared gradients.

    Source: Duchi et al. 2011; torch.optim.Adagrad.
    """

    lr: float = 1e-2
    eps: float = 1e-10

    def start(self, parameters: Parameters) -> Parameters:
        return zeros_like(parameters)

    def update(
        self, state: Parameters, gradient: Parameters, parameters: Parameters
    ) -> tuple[Parameters, Parameters]:
        squares = elementwise(lambda s, g: s + g**2, state, gradient)

        def step(w: Array, g: Array, s: Array) -> Array:
            return w - self.lr * g / (np.sqrt(s) + self.eps)

        return squares, elementwise(step, parameters, gradient, squares)


@dataclass(frozen=True, slots=True)
class RMSProp:
    """Learning rate for each number, by the moving average of its squared gradients.

    Source: Tieleman and Hinton 2012, lecture 6.5; torch.optim.RMSprop.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8

    def start(self, parameters: Parameters) -> Parameters:
        return zeros_like(parameters)

    def update(
        self, state: Parameters, gradient: Parameters, parameters: Parameters
    ) -> tuple[Parameters, Parameters]:
        squares = elementwise(
            lambda s, g: self.alpha * s + (1 - self.alpha) * g**2, state, gradient
        )

        def step(w: Array, g: Array, s: Array) -> Array:
            return w - self.lr * g / (np.sqrt(s) + self.eps)

        return squares, elementwise(step, parameters, gradient, squares)


@dataclass(frozen=True, slots=True)
class Moments:
    """State of Adam: moving averages, before the correction for their start at 0."""

    num_updates: int
    mean: Parameters
    square: Parameters


@dataclass(frozen=True, slots=True)
class Adam:
    """Moving averages of the gradient and of its square, corrected for their start at 0.

    Source: Kingma and Ba 2015, algorithm 1; torch.optim.Adam.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, parameters: Parameters) -> Moments:
        return Moments(0, zeros_like(parameters), zeros_like(parameters))

    def update(
        self, state: Moments, gradient: Parameters, parameters: Parameters
    ) -> tuple[Moments, Parameters]:
        b1, b2 = self.betas
        t = state.num_updates + 1
        mean = elementwise(lambda u, g: b1 * u + (1 - b1) * g, state.mean, gradient)
        square = elementwise(lambda s, g: b2 * s + (1 - b2) * g**2, state.square, gradient)

        def step(w: Array, u: Array, s: Array) -> Array:
            return w - self.lr * u / (1 - b1**t) / (np.sqrt(s / (1 - b2**t)) + self.eps)

        return Moments(t, mean, square), elementwise(step, parameters, mean, square)


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with a separate decay of all weights and biases.

    Source: Loshchilov and Hutter 2019, algorithm 2; torch.optim.AdamW.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def start(self, parameters: Parameters) -> Moments:
        return self.adam.start(parameters)

    def update(
        self, state: Moments, gradient: Parameters, parameters: Parameters
    ) -> tuple[Moments, Parameters]:
        decayed = elementwise(lambda w: (1 - self.lr * self.weight_decay) * w, parameters)
        return self.adam.update(state, gradient, decayed)

    @property
    def adam(self) -> Adam:
        return Adam(self.lr, self.betas, self.eps)
