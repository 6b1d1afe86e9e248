"""Curves as characters, for a terminal of any kind: a letter for each, * where some meet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np

__all__ = ["Band", "chart"]

WIDTH, HEIGHT = 64, 14
_LOGARITHMIC = 10.0  # from which ratio of the largest to the smallest value on


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A curve, and between what it may lie."""

    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def chart(
    lines: Mapping[str, Sequence[float]], ends: tuple[str, str], *, width: int = WIDTH
) -> list[str]:
    """A plot, row by row, and below it which letter is what.

    Args:
        lines: values of each curve at equal distances; all curves have as many.
        ends: what to write at the left and at the right end.

    The scale is logarithmic where all values are above 0 and span a factor of 10.
    """
    drawn = {name: _at_columns(values, width) for name, values in lines.items()}
    every = np.concatenate(list(drawn.values()))
    low, high = float(every.min()), float(every.max())
    logarithmic = low > 0 and high / low >= _LOGARITHMIC
    cells = [[" "] * width for _ in range(HEIGHT)]
    for letter, values in zip(ascii_uppercase, drawn.values(), strict=False):
        for column, value in enumerate(values):
            row = _row(float(value), low, high, logarithmic)
            cells[row][column] = letter if cells[row][column] == " " else "*"
    labels = {0: f"{high:.4g}", HEIGHT - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    rows = [f"{labels.get(i, ''):>{margin}} |{''.join(row)}" for i, row in enumerate(cells)]
    gap = max(width - len(ends[0]) - len(ends[1]), 1)
    rows.append(f"{'':>{margin}} +{'-' * width}")
    rows.append(f"{'':>{margin}}  {ends[0]}{' ' * gap}{ends[1]}")
    names = "   ".join(f"{letter} {name}" for letter, name in zip(ascii_uppercase, lines))  # noqa: B905
    return [*rows, names + ("   (logarithmic)" if logarithmic else "")]


def _at_columns(
    values: Sequence[float], width: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    places = np.linspace(0, len(values) - 1, width)
    return np.interp(places, np.arange(len(values)), np.array(values, dtype=np.float64))


def _row(value: float, low: float, high: float, logarithmic: bool) -> int:
    """From 0 at the top."""
    if high == low:
        return HEIGHT // 2
    share = (
        math.log(value / low) / math.log(high / low)
        if logarithmic
        else (value - low) / (high - low)
    )
    return HEIGHT - 1 - round(share * (HEIGHT - 1))
