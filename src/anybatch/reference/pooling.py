"""Max pooling: a window outputs its largest input, which alone gets the gradient.

    y[q, r, c] = max of x[q, window(r, c)],   winner[q, r, c] = its index i W + j in the plane
    dL/dx[q, n] = sum of e[q, r, c] over the windows whose winner is n

q, r, c   channel, row and column of the output;   W  columns of the input
window    rows r s - p to r s - p + k, columns alike, cut off at the edges of
          the input, which is the same as padding with -inf

Each example has its own winners. So in a batch a window may pass gradients to many inputs, each
from other examples. No gradient is split over winners. Of equal inputs the first in row-major order
wins, as in torch. Gradients of overlapping windows add.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from anybatch.reference.convolution import Size, pair
from anybatch.reference.layers import Layer, Stored, check_example
from anybatch.reference.parameters import Array

__all__ = ["MaxPool2d", "count_windows"]


def count_windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Count the windows along one side.

    floor((n + 2 p - k) / s) + 1. With `ceil_mode` the quotient is rounded up, and a last window
    that would start at or beyond n + p, in the padding on the right, is dropped.

    Args:
        size: n, inputs along this side.
        kernel: k.
        stride: s.
        padding: p, on each end.
        ceil_mode: round up.

    Returns:
        The count; below 1 if no window fits.

    Source: Caffe, PoolingLayer::Reshape, which always rounds up, and drops only if p > 0 (so it
    differs if s > k, when the last window would be empty); torch, MaxPool2d, which drops in
    either case.
    """
    span = size + 2 * padding - kernel
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


@dataclass(frozen=True, slots=True)
class MaxPool2d(Layer):
    """Maximum over windows of [C, H, W]; `stored["winners"]` has the shape of the output."""

    kernel: Size
    stride: Size | None = None  # None: the kernel, so that windows tile the input
    padding: Size = 0
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if any(2 * p > k for p, k in zip(pair(self.padding), pair(self.kernel), strict=True)):
            raise ValueError(
                f"{self} pads by more than half its kernel. A window could then be all padding and "
                f"have no winner. Use a padding of at most half the kernel."
            )

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        check_example(self, x, (None, None, None))
        plane = np.arange(prod(x.shape[1:])).reshape(x.shape[1:])
        channels = np.arange(len(x))
        winners = np.empty((len(x), *self.output_size(x)), dtype=np.int64)
        for r, c in np.ndindex(winners.shape[1:]):
            window = self.window(r, c)
            inputs = x[:, *window].reshape(len(x), -1)
            winners[:, r, c] = plane[window].ravel()[inputs.argmax(axis=1)]  # the first of equals
        output = x.reshape(len(x), -1)[channels[:, np.newaxis, np.newaxis], winners]
        return output, {"winners": winners, "shape": np.array(x.shape)}

    def backward(
        self, stored: Stored, error: Array, parameters: dict[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        input_error = np.zeros(stored["shape"])
        for plane, winners, channel_error in zip(
            input_error, stored["winners"], error, strict=True
        ):
            np.add.at(plane.reshape(-1), winners, channel_error)
        return input_error, {}

    def output_size(self, x: Array) -> tuple[int, int]:
        """Return rows and columns of the output."""
        rows, columns = (
            count_windows(size, kernel, stride, padding, self.ceil_mode)
            for size, kernel, stride, padding in zip(
                x.shape[1:], pair(self.kernel), self.steps, pair(self.padding), strict=True
            )
        )
        if min(rows, columns) < 1:
            raise ValueError(
                f"{self} has a window larger than its padded input of {x.shape[1:]}, so it has no "
                f"output. Use a smaller kernel, more padding or a larger input."
            )
        return rows, columns

    def window(self, r: int, c: int) -> tuple[slice, slice]:
        """Return the rows and columns of the input in the window of output (r, c)."""
        rows, columns = (
            slice(max(index * step - padding, 0), index * step - padding + kernel)
            for index, step, padding, kernel in zip(
                (r, c), self.steps, pair(self.padding), pair(self.kernel), strict=True
            )
        )
        return rows, columns

    @property
    def steps(self) -> tuple[int, int]:
        """Rows and columns from one window to the next."""
        return pair(self.kernel if self.stride is None else self.stride)
