"""Ties of max-pooling: windows in which more than one input is the largest.

    maxima[r, c] = number of inputs of window (r, c) that equal y[r, c]
    tied[n]      = whether input n equals the maximum of a window that has more than one

The gradient of such a window has to go somewhere. PyTorch's max_pool2d gives all of it to the first
of the equal inputs, by rows from left to right.
"""

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
    pairs = zip(call.x.detach(), call.y.detach(), strict=True)  # one at a time, to save memory
    maxima, tied, first = zip(*(_find_in_example(call, x, y) for x, y in pairs), strict=True)
    return Ties(torch.stack(maxima), torch.stack(tied), torch.stack(first))


def _find_in_example(call: Window, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the fields of `Ties` for inputs [C, H, W] and maxima [C, h, w] of one example."""
    names = ("kernel_size", "stride", "dilation")
    sizes: dict[str, Any] = {name: call.get_sizes(name) for name in names}
    places = torch.arange(x[0].numel(), device=x.device).view_as(x[:1]).double()
    planes = _pad(call, x, float("nan"))  # equals nothing
    is_largest = F.unfold(planes[:, None], **sizes) == y.flatten(1)[:, None]  # [C, k, h w]
    maxima = is_largest.sum(1)
    where = F.unfold(_pad(call, places, -1)[:, None], **sizes).long().expand_as(is_largest)
    first = where.gather(1, is_largest.byte().argmax(1, keepdim=True))[:, 0]
    marks = (is_largest & (maxima > 1)[:, None]).double()
    tied = F.fold(marks, planes.shape[1:], **sizes)[:, 0] > 0
    (top, left), (height, width) = call.get_sizes("padding"), x.shape[1:]
    tied = tied[:, top : top + height, left : left + width]
    return maxima.view_as(y), tied, first.where(maxima > 0, -1).view_as(y)


def _pad(call: Window, values: Tensor, fill: float) -> Tensor:
    """Pad planes on all sides, so that every window lies within them."""
    amounts: list[int] = []
    for axis in (1, 0):  # F.pad begins with the last dimension
        stride, dilation = call.get_sizes("stride")[axis], call.get_sizes("dilation")[axis]
        before, kernel = call.get_sizes("padding")[axis], call.get_sizes("kernel_size")[axis]
        end = (call.y.shape[2 + axis] - 1) * stride + dilation * (kernel - 1) + 1
        amounts += [before, max(0, end - before - call.x.shape[2 + axis])]
    return F.pad(values, amounts, value=fill)
