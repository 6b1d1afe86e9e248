"""Convolution of one example: the cross-correlation that torch calls Conv2d.

    y[o, r, c] = b[o] + sum over q, i, j of w[o, q, i, j] x[q, r s + i, c s + j]

o, q    output and input channel
r, c    row and column of the output
i, j    row and column of the kernel: one tap
s       stride; x is padded with zeros

A tap reads the input on a grid of stride s. All three passes are loops over taps: the forward pass
reads each grid, and the backward pass writes to it.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from anybatch.reference.layers import Layer, Stored, check_example
from anybatch.reference.parameters import Array

__all__ = ["Conv2d", "Size", "pair"]

Size: TypeAlias = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Return rows and columns; one number is both."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, slots=True)
class Conv2d(Layer):
    """Cross-correlation of [inputs, H, W] with a weight of [outputs, inputs, kh, kw]."""

    inputs: int
    outputs: int
    kernel: Size
    stride: Size = 1
    padding: Size = 0
    bias: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        weight = {"weight": (self.outputs, self.inputs, *pair(self.kernel))}
        return weight | ({"bias": (self.outputs,)} if self.bias else {})

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        check_example(self, x, (self.inputs, None, None))
        weight = parameters["weight"]
        above, left = pair(self.padding)
        padded = np.pad(x, ((0, 0), (above, above), (left, left)))
        output = np.zeros((self.outputs, *self.output_size(padded)))
        for i, j in np.ndindex(pair(self.kernel)):
            inputs = self.grid(padded, i, j)
            output += np.tensordot(weight[:, :, i, j], inputs, axes=1)
        if self.bias:
            output += parameters["bias"][:, np.newaxis, np.newaxis]
        return output, {"padded": padded}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        weight, padded = parameters["weight"], stored["padded"]
        weight_gradient, padded_error = np.zeros_like(weight), np.zeros_like(padded)
        for i, j in np.ndindex(pair(self.kernel)):
            inputs = self.grid(padded, i, j)
            weight_gradient[:, :, i, j] = np.tensordot(error, inputs, axes=((1, 2), (1, 2)))
            input_error = self.grid(padded_error, i, j)  # a view of padded_error
            input_error += np.tensordot(weight[:, :, i, j].T, error, axes=1)
        gradients = {"weight": weight_gradient}
        if self.bias:
            gradients["bias"] = error.sum(axis=(1, 2))
        return self.remove_padding(padded_error), gradients

    def output_size(self, padded: Array) -> tuple[int, int]:
        """Return rows and columns of the output: floor((n - k) / s) + 1 for n padded inputs."""
        rows, columns = (
            (size - kernel) // stride + 1
            for size, kernel, stride in zip(
                padded.shape[1:], pair(self.kernel), pair(self.stride), strict=True
            )
        )
        if min(rows, columns) < 1:
            raise ValueError(
                f"{self} has a kernel larger than its padded input of {padded.shape[1:]}, so it "
                f"has no output. Pad more, or use a smaller kernel or a larger input."
            )
        return rows, columns

    def grid(self, padded: Array, i: int, j: int) -> Array:
        """Return the inputs of tap (i, j): a view of [inputs, output rows, output columns]."""
        rows, columns = self.output_size(padded)
        down, right = pair(self.stride)
        grid_rows = slice(i, i + (rows - 1) * down + 1, down)
        grid_columns = slice(j, j + (columns - 1) * right + 1, right)
        return padded[:, grid_rows, grid_columns]

    def remove_padding(self, padded: Array) -> Array:
        """Return the part of a padded array that belongs to the input."""
        above, left = pair(self.padding)
        return padded[:, above : padded.shape[1] - above, left : padded.shape[2] - left]
