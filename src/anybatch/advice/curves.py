"""Training losses of runs with different batch sizes, at equal numbers of examples.

Update t of a run uses the examples x_(t-1) .. x_t of its way. x_t is the number used so far, and
l_t their mean loss before that update. As a function of the examples the loss is a staircase:

    C(x) = integral of l over 0 .. x    (straight between the x_t)
    l(x; w) = (C(x) - C(x - w)) / w     the mean over the last w examples
    mean over a .. b = (C(b) - C(a)) / (b - a)

Each example counts once, with its loss before its update, whatever the batch size.
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
    """Staircase of one run.

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
        """Number of examples used by the whole run."""
        return self.ends[-1]

    @property
    def largest_batch(self) -> int:
        """Examples of the largest update."""
        return int(np.diff(self.ends, prepend=0).max())

    def mean(self, start: float, stop: float) -> float:
        """Return the mean loss of the examples start .. stop."""
        a, b = self._integrate(np.array([start, stop]))
        return float(b - a) / (stop - start)

    def smooth(self, grid: Numbers, window: float) -> Numbers:
        """Return the mean loss of the last `window` examples at each place of a grid."""
        means: Numbers = (self._integrate(grid) - self._integrate(grid - window)) / window
        return means

    def _integrate(self, examples: Numbers) -> Numbers:
        ends = np.array([0, *self.ends], dtype=np.float64)
        sums = np.concatenate([[0.0], np.cumsum(np.diff(ends) * np.array(self.losses))])
        return np.asarray(np.interp(examples, ends, sums))


def choose_grid(curves: Sequence[Curve]) -> tuple[Numbers, int]:
    """Choose where the curves of several runs are compared: the places, and the window in examples.

    The window is a tenth of the shortest first epoch, or the largest batch if that is more. The
    grid goes from there to where the shortest run ends.
    """
    stop = min(curve.examples for curve in curves)
    tenth = min(curve.first_epoch for curve in curves) // 10
    window = min(max(tenth, *(curve.largest_batch for curve in curves)), stop)
    return np.linspace(window, stop, min(POINTS, max(stop - window, 1))), window
