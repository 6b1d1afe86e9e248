"""Local response normalisation: a channel is divided by the activity of its neighbours.

    s[c] = k + (alpha / n) * sum over c' in window(c) of x[c']^2
    y[c] = x[c] s[c]^(-beta)
    dL/dx[j] = e[j] s[j]^(-beta) - (2 alpha beta / n) x[j] * sum over c with j in window(c)
               of e[c] x[c] s[c]^(-beta - 1)

c          channel; each pixel is normalised alone
n          size of the window: channels c - n//2 to c + (n - 1)//2, as far as they exist
e          the error of y

alpha is divided by n, as in torch and Caffe. TensorFlow does not divide: its
alpha and depth_radius are alpha / n and n//2 here, with n odd.
"""

from dataclasses import dataclass

import numpy as np

from anybatch.reference.layers import Layer, Stored, check_example
from anybatch.reference.parameters import Array

__all__ = ["LocalResponseNorm"]


def sum_windows(values: Array, before: int, after: int) -> Array:
    """Sum over the channels c - before to c + after, for each channel c: [C, H, W]."""
    return np.stack(
        [values[max(c - before, 0) : c + after + 1].sum(axis=0) for c in range(len(values))]
    )


@dataclass(frozen=True, slots=True)
class LocalResponseNorm(Layer):
    """Normalisation of [C, H, W] over neighbouring channels.

    Source: Krizhevsky et al. 2012, section 3.3; torch, LocalResponseNorm.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        check_example(self, x, (None, None, None))
        squares = sum_windows(x**2, before=self.size // 2, after=(self.size - 1) // 2)
        scale = self.k + self.alpha / self.size * squares
        return x * scale**-self.beta, {"x": x, "scale": scale}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        x, scale = stored["x"], stored["scale"]
        # The channels c whose window contains j are the window of j, mirrored.
        through_scale = sum_windows(
            error * x * scale ** (-self.beta - 1), before=(self.size - 1) // 2, after=self.size // 2
        )
        factor = 2 * self.alpha * self.beta / self.size
        return error * scale**-self.beta - factor * x * through_scale, {}
