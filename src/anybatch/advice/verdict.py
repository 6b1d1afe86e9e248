"""The verdict of a comparison, in words.

    n pairs tell two recipes apart if 0 lies outside  mean d  +-  t(n - 1) sd(d) / sqrt(n)

If it lies inside, the verdict estimates the n that would move it outside, with mean and standard
deviation as they are. The estimate is rough: of 3 pairs the standard deviation itself is hardly
known.
"""

import math

from anybatch.advice.compared import Compared
from anybatch.advice.pairs import Paired, student

__all__ = ["pairs_needed", "verdicts"]

MOST = 1000  # pairs; more are no advice


def verdicts(found: Compared) -> list[str]:
    """Say for each figure and each recipe but the first whether the runs tell the two apart."""
    return [
        _verdict(title, found.names[0], other, figure.differences[other])
        for title, figure in found.figures.items()
        for other in found.others
    ]


def pairs_needed(difference: Paired) -> int | None:
    """Estimate how many pairs would tell two recipes apart; None: more than `MOST`.

    Example:
        >>> pairs_needed(Paired(pairs=3, mean=1.0, spread=2.0, low=-4.0, high=6.0))
        18
    """
    for n in range(2, MOST + 1):
        if student(n - 1) * difference.spread / math.sqrt(n) < abs(difference.mean):
            return n
    return None


def _verdict(title: str, first: str, other: str, difference: Paired | None) -> str:
    figure = title[:1].upper() + title[1:]
    if difference is None:
        return f"{figure}: no seed has a run of both {first} and {other} yet."
    if difference.pairs == 1:
        return f"{figure}: one pair cannot tell {other} from {first}. Take more: --seeds 5"
    pairs = f"{difference.pairs} pairs"
    if difference.mean == difference.spread == 0:
        return f"{figure}: {other} and {first} are equal in all {pairs}."
    if difference.low <= 0 <= difference.high:
        return f"{figure}: {pairs} cannot tell {other} from {first}. {_outlook(difference)}"
    word = "lower" if difference.mean < 0 else "higher"
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return (
        f"{figure}: {other} is {word} than {first} by {abs(difference.mean):.3g} ({low:.3g} to "
        f"{high:.3g}), as {pairs} show."
    )


def _outlook(difference: Paired) -> str:
    needed = pairs_needed(difference)
    if needed is None:
        return f"More than {MOST:,} pairs would be needed: take the two as equal."
    return f"About {needed:,} would, if the difference stays {difference.mean:.3g}."
