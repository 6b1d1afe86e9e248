"""Max pooling: each window hands on its largest input, and back to it alone.

    y[q, r, c] = max of x[q, window(r, c)],   winner[q, r, c] = its index i W + j in the plane
    dL/dx[q, n] = sum of e[q, r, c] over the windows whose winner is n

q, r, c   channel, row and column of the output;   W  columns of the input
window    rows r s - p to r s - p + k, columns alike, cut off at the edges of
          the input, which is the same as padding with -inf

The winner belongs to one example. In a batch each example finds its own, so a
window can pass gradients to many inputs, each from a different subset of the
examples; nothing is ever split over the winners of the batch. Of equal inputs
the first in row-major order wins, as in torch. Overlapping windows add.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from anybatch.reference.convolution import Size, pair
from anybatch.reference.layers import Stored, check_example
from anybatch.reference.parameters import Array

__all__ = ["MaxPool2d", "pooled_size"]


def pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows there are along one side.

    floor((n + 2 p - k) / s) + 1, or with `ceil_mode` the quotient rounded up;
    then a last window that would start at or beyond n + p, in the padding on
    the right, is dropped.

    Args:
        size: n, inputs along this side.
        kernel: k.
        stride: s.
        padding: p, on each end.
        ceil_mode: round up.

    Returns:
        The count; below 1 if no window fits.

    Source: Caffe, PoolingLayer::Reshape, which rounds up always and drops only
    if p > 0 (it differs where s > k, whose last window would be empty); torch,
    MaxPool2d, which drops in either case.
    """
    span = size + 2 * padding - kernel
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """Maximum over windows of [C, H, W]; `stored["winners"]` has the shape of the output."""

    kernel: Size
    stride: Size | None = None  # None: the kernel, so that windows tile the input
    padding: Size = 0
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if any(2 * p > k for p, k in zip(pair(self.padding), pair(self.kernel), strict=True)):
            raise ValueError(
                f"{self} pads by more than half its kernel: a window could lie in the padding "
                f"alone and have no winner. Take a padding of at most half the kernel."
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Array, parameters: dict[str, Array]) -> tuple[Array, Stored]:
        check_example(self, x, (None, None, None))
        plane = np.arange(prod(x.shape[1:])).reshape(x.shape[1:])
        channels = np.arange(len(x))
        winners = np.empty((len(x), *self.output_size(x)), dtype=np.int64)
        for r, c in np.ndindex(winners.shape[1:]):
            window = self.window(r, c)
            seen = x[:, *window].reshape(len(x), -1)
            winners[:, r, c] = plane[window].ravel()[seen.argmax(axis=1)]  # argmax: the first
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
        """Rows and columns of the output."""
        rows, columns = (
            pooled_size(size, kernel, stride, padding, self.ceil_mode)
            for size, kernel, stride, padding in zip(
                x.shape[1:], pair(self.kernel), self.steps, pair(self.padding), strict=True
            )
        )
        if min(rows, columns) < 1:
            raise ValueError(
                f"{self} has a window larger than its padded input of {x.shape[1:]}: no output "
                f"is left. Take a smaller kernel, more padding or a larger input."
            )
        return rows, columns

    def window(self, r: int, c: int) -> tuple[slice, slice]:
        """The rows and columns of the input that output (r, c) sees."""
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
