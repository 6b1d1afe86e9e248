"""The training loss of runs with different batch sizes, at equal numbers of examples.

A run has made update t from the examples x_(t-1) .. x_t of its way, x_t those used so far, and l_t
is their mean loss before that update. As a function of the examples the loss is a staircase:

    C(x) = integral of l over 0 .. x    (straight between the x_t)
    l(x; w) = (C(x) - C(x - w)) / w     the mean over the last w examples
    mean over a .. b = (C(b) - C(a)) / (b - a)

Each example counts once, with the loss that it had when it was met, whatever the batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "choose_grid"]

Numbers = NDArray[np.float64]

POINTS = 200  # of a grid


@dataclass(frozen=True)
class Curve:
    """The staircase of one run.

    Args:
        ends: examples used so far after each update, rising.
        losses: of the examples of each update.
        first_epoch: examples of the first epoch.
    """

    ends: Sequence[int]
    losses: Sequence[float]
    first_epoch: int

    @property
    def examples(self) -> int:
        """Used in all."""
        return self.ends[-1]

    @property
    def largest_batch(self) -> int:
        """Examples of the largest update."""
        return int(np.diff(self.ends, prepend=0).max())

    def mean(self, start: float, stop: float) -> float:
        """Mean loss of the examples start .. stop."""
        a, b = self._integral(np.array([start, stop]))
        return float(b - a) / (stop - start)

    def smoothed(self, grid: Numbers, window: float) -> Numbers:
        """Mean loss of the last `window` examples, at each place of a grid from `window` on."""
        found: Numbers = (self._integral(grid) - self._integral(grid - window)) / window
        return found

    def _integral(self, examples: Numbers) -> Numbers:
        ends = np.array([0, *self.ends], dtype=np.float64)
        sums = np.concatenate([[0.0], np.cumsum(np.diff(ends) * np.array(self.losses))])
        found: Numbers = np.interp(examples, ends, sums)
        return found


def choose_grid(curves: Sequence[Curve]) -> tuple[Numbers, int]:
    """Where the curves of several runs are compared: the places, and the window in examples.

    The window is a tenth of the shortest first epoch, or the largest batch if that is more; the
    grid goes from there to where the shortest run ends.
    """
    stop = min(curve.examples for curve in curves)
    tenth = min(curve.first_epoch for curve in curves) // 10
    window = min(max(tenth, *(curve.largest_batch for curve in curves)), stop)
    return np.linspace(window, stop, min(POINTS, max(stop - window, 1))), window
