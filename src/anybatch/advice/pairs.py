"""Compare two recipes by runs in pairs: the same seed, the same split.

    d_s = b_s - a_s,    mean d  +-  t(n - 1) sd(d) / sqrt(n)

n pairs, sd with the divisor n - 1, t(nu) the 97.5 % quantile of Student's t: the 95 % interval.
What a seed does to both runs cancels in d. t is found by bisection, from the probability within
+-t. For a whole number nu of degrees of freedom this is a finite sum, with x = atan(t / sqrt(nu))
and powers of the cosine up to nu - 2:

    nu even:  sin x (1 + 1/2 cos^2 x + (1 3)/(2 4) cos^4 x + ...)
    nu odd:   2/pi (x + sin x (cos x + 2/3 cos^3 x + (2 4)/(3 5) cos^5 x + ...))

n pairs tell two recipes apart if 0 lies outside the interval. If it lies inside, the number of
pairs that would move it outside is estimated, with mean and sd as they are. The estimate is rough:
from 3 pairs, sd itself is hardly known.

Source: Student 1908; the sums are Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from anybatch.errors import RunError

__all__ = [
    "MAX_PAIRS",
    "PairedDifference",
    "compare_pairs",
    "count_needed_pairs",
    "find_student_quantile",
]

MAX_PAIRS = 1000  # more are no advice
_HALVINGS = 60  # of the angle: to the last bit but a few


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Mean difference of pairs, and its interval."""

    pairs: int
    mean: float
    spread: float  # standard deviation, n - 1; nan of a single pair
    low: float  # 95 % interval; nan of a single pair
    high: float


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compute the mean of second minus first, and its interval.

    Example:
        >>> difference = compare_pairs([1.0, 2.0, 3.0], [2.0, 3.0, 4.5])
        >>> difference.pairs, round(difference.mean, 3)
        (3, 1.167)

    Args:
        first, second: a figure of each pair, in the same order.

    Raises:
        RunError: there is no pair, or the numbers do not pair up.
    """
    if len(first) != len(second) or not first:
        raise RunError(
            f"the figures are {len(first)} and {len(second)}. Expected pairs: each seed needs a "
            f"run of both recipes."
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n, middle = len(differences), mean(differences)
    if n == 1:
        return PairedDifference(pairs=1, mean=middle, spread=math.nan, low=math.nan, high=math.nan)
    deviation = stdev(differences)
    half = find_student_quantile(n - 1) * deviation / math.sqrt(n)
    low, high = middle - half, middle + half
    return PairedDifference(pairs=n, mean=middle, spread=deviation, low=low, high=high)


def count_needed_pairs(difference: PairedDifference) -> int | None:
    """Estimate how many pairs would tell two recipes apart; None: more than `MAX_PAIRS`.

    Example:
        >>> count_needed_pairs(PairedDifference(pairs=3, mean=1.0, spread=2.0, low=-4.0, high=6.0))
        18
    """
    for n in range(2, MAX_PAIRS + 1):
        if find_student_quantile(n - 1) * difference.spread / math.sqrt(n) < abs(difference.mean):
            return n
    return None


def find_student_quantile(degrees: int) -> float:
    """Find the 97.5 % quantile of Student's t, for degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _compute_probability(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(high)


def _compute_probability(angle: float, degrees: int) -> float:
    """Compute the probability that |T| is at most sqrt(degrees) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
