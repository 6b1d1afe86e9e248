"""Ties of max-pooling: windows in which more than one input is the largest.

    maxima[r, c] = number of inputs of window (r, c) that equal y[r, c]
    tied[n]      = whether input n equals the maximum of a window that has more than one

The gradient of such a window has to go somewhere. PyTorch's max_pool2d gives all of it to the first
of the equal inputs, by rows from left to right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Ties", "Window", "find_ties"]


class Window(Protocol):
    """Call of max-pooling; see `PoolingCall`."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def winners(self) -> Tensor: ...
    def get_sizes(self, name: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Ties:
    """Windows of a call with more than one largest input."""

    maxima: Tensor  # [B, C, h, w], largest inputs of each window
    tied: Tensor  # [B, C, H, W], inputs that are one of several largest
    first: Tensor  # [B, C, h, w], place of the first largest input in the plane

    def summarize(self, winners: Tensor, gradients: Tensor) -> dict[str, Any]:
        """Count the windows with ties, and measure how much of the gradient goes through them.

        Args:
            winners: [B, C, h, w], place of the input that won.
            gradients: [B, C, h, w], gradient that arrives at each window.
        """
        has_tie, sizes = self.maxima > 1, gradients.abs().double()
        total = float(sizes.sum())
        return {
            "windows": has_tie.numel(),
            "tied": int(has_tie.sum()),
            "first": int((has_tie & (winners == self.first)).sum()),
            "gradient": float(sizes[has_tie].sum()) / total if total else 0.0,
        }


def find_ties(call: Window) -> Ties:
    """Compare every input of every window with the maximum of the window."""
    height, width = call.x.shape[2:]
    maxima = torch.zeros(call.y.shape, dtype=torch.int32, device=call.x.device)
    first = torch.full_like(call.winners, -1)
    x = _pad(call, call.x.detach(), float("nan"))  # equals nothing
    rows, columns = _list_places(call)
    for i, j, view in _iterate_offsets(call):
        is_largest = view(x) == call.y
        place = (rows[i][:, None] * width + columns[j]).to(first)
        first = torch.where(is_largest & (maxima == 0), place, first)
        maxima += is_largest
    marks = _pad(call, torch.zeros_like(call.x, dtype=torch.uint8), 0)
    for _, _, view in _iterate_offsets(call):
        view(marks).logical_or_((view(x) == call.y) & (maxima > 1))
    top, left = call.get_sizes("padding")
    return Ties(maxima, marks[:, :, top : top + height, left : left + width].bool(), first)


def _pad(call: Window, values: Tensor, fill: float) -> Tensor:
    """Pad planes on all sides, so that every window lies within them."""
    amounts: list[int] = []
    for axis in (1, 0):  # F.pad begins with the last dimension
        stride, dilation = call.get_sizes("stride")[axis], call.get_sizes("dilation")[axis]
        before, kernel = call.get_sizes("padding")[axis], call.get_sizes("kernel_size")[axis]
        end = (call.y.shape[2 + axis] - 1) * stride + dilation * (kernel - 1) + 1
        amounts += [before, max(0, end - before - call.x.shape[2 + axis])]
    return F.pad(values, amounts, value=fill)


def _iterate_offsets(call: Window) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
    """Yield each place (i, j) within a window, and a function that views these inputs."""
    (kernel_rows, kernel_columns), (down, right) = (
        call.get_sizes("kernel_size"),
        call.get_sizes("stride"),
    )
    far_down, far_right = call.get_sizes("dilation")
    height, width = call.y.shape[2:]

    def select(top: int, left: int) -> Callable[[Tensor], Tensor]:
        return lambda planes: planes[
            :,
            :,
            top : top + (height - 1) * down + 1 : down,
            left : left + (width - 1) * right + 1 : right,
        ]

    for i in range(kernel_rows):
        for j in range(kernel_columns):
            yield i, j, select(i * far_down, j * far_right)


def _list_places(call: Window) -> tuple[list[Tensor], list[Tensor]]:
    """List the rows, and the columns, of the inputs at each offset of all windows."""
    places: list[list[Tensor]] = []
    for axis in (0, 1):
        stride, padding, dilation, kernel = (
            call.get_sizes(name)[axis] for name in ("stride", "padding", "dilation", "kernel_size")
        )
        begins = torch.arange(call.y.shape[2 + axis], device=call.x.device) * stride - padding
        places.append([begins + k * dilation for k in range(kernel)])
    return places[0], places[1]
