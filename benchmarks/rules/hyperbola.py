"""Fit steps S and examples E = S B to a target, against the batch size B.

    (S / S_min - 1) (E / E_min - 1) = 1,    that is    S = S_min (1 + B_crit / B)

with B_crit = E_min / S_min. A step at batch size B makes 1 / (1 + B_simple / B) of the progress of
one without noise (McCandlish et al. 2018, 1812.06162, sections 2.2 and 2.3). Where B_simple
changes on the way, each of the S_min steps without noise becomes 1 + B_simple / B, so that B_crit
is predicted to be the mean of B_simple over these steps.
"""

import math
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

__all__ = ["Hyperbola", "fit_curve", "fit_minimum"]


class Hyperbola(NamedTuple):
    """Curve of steps against the batch size."""

    s_min: float  # updates
    b_crit: float  # examples

    def steps(self, size: float) -> float:
        """Updates to the target at a batch size."""
        return self.s_min * (1 + self.b_crit / size)


Points = Sequence[tuple[float, float]]  # B, S


def fit_minimum(b_crit: float, points: Points) -> Hyperbola:
    """Return the hyperbola with this B_crit whose S_min is closest to the points, by ln S."""
    return Hyperbola(math.exp(mean(math.log(s / (1 + b_crit / b)) for b, s in points)), b_crit)


def fit_curve(points: Points) -> Hyperbola:
    """Return the hyperbola closest to the points, by the squares of the differences of ln S."""

    def misfit(log_b: float) -> float:
        curve = fit_minimum(math.exp(log_b), points)
        return sum(math.log(s / curve.steps(b)) ** 2 for b, s in points)

    low, high = 0.0, math.log(1e6)
    for _ in range(200):  # thirds: the misfit has one minimum there
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if misfit(a) < misfit(b) else (a, high)
    return fit_minimum(math.exp((low + high) / 2), points)
