"""How the gradient of a layout differs, and from which mistake that probably comes.

    g = f w + r,    f = <g, w> / |w|^2

w is the gradient of the whole batch in one micro-batch, g that of another layout; f is the factor
by which g differs, r what no factor explains. A forgotten division shows as f = K, one too many
as f = 1/K, K the number of micro-batches; a mean of means shows on unequal micro-batches alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["Comparison", "compare", "in_words", "likely_cause"]

_DIVIDE = "Divide each micro-batch's summed loss by the count of the whole batch"
_NOT_DIVIDED = f"""the loss is not divided by the number of micro-batches, or by a constant that \
does not follow it. {_DIVIDE}"""
_DIVIDED_TWICE = """the loss is divided twice: by the count of the whole batch, and again by the \
number of micro-batches (or of ranks). Drop the second division"""
_MEAN_OF_MEANS = f"a mean of means: micro-batches of unequal size weigh the same. {_DIVIDE}"
_SHORT_END = """the count that divides the loss takes the last, shorter micro-batch for a full \
one. Count the examples of the whole batch"""
_NO_FACTOR = """no common factor explains it. Micro-batches with unequal counts (tokens) weigh the \
same, examples are coupled (batch normalisation), gradients are lost between micro-batches, or the \
step computes in less precision than its weights have (then pass a tolerance)"""


class Comparison(NamedTuple):
    """The gradient g of one layout beside w."""

    sizes: Sequence[int]
    difference: float  # |g - w| / s
    factor: float  # f; nan where w is 0 within the tolerance
    beyond: float  # |r| / s


def compare(
    sizes: Sequence[int], gradient: Tensor, whole: Tensor, scale: float, tolerance: float
) -> Comparison:
    """Take g apart into a multiple of w and the rest; s is the scale."""
    difference = (gradient - whole).norm().item() / scale
    if whole.norm().item() <= tolerance * scale:
        return Comparison(sizes, difference, math.nan, difference)
    factor = (gradient @ whole / (whole @ whole)).item()
    return Comparison(sizes, difference, factor, (gradient - factor * whole).norm().item() / scale)


def in_words(one: Comparison, tolerance: float) -> str:
    """A line on a layout that differs."""
    if not math.isfinite(one.difference):
        how = "not finite (0 / 0 in a micro-batch without a counted term?)"
    elif math.isnan(one.factor):
        how = f"{one.difference:.3g} of the scale, where the whole batch's gradient is 0"
    else:
        more = f", and {one.beyond:.3g} of the scale beyond a factor" * (one.beyond > tolerance)
        how = f"{one.factor:.3f} times (off by {one.difference:.3g} of the scale{more})"
    shown = one.sizes if len(one.sizes) <= 8 else [*one.sizes[:2], "...", one.sizes[-1]]
    return f"  {'+'.join(map(str, shown))}: {how}"


def likely_cause(differing: Sequence[Comparison], tolerance: float) -> str:
    """The mistake that the layouts that differ have in common."""
    # Equal micro-batches tell a wrong divisor from wrong weights; without any, judge by all.
    equal = [one for one in differing if len(set(one.sizes)) == 1]
    judges = [(one.factor, len(one.sizes)) for one in equal or differing]
    if all(math.isclose(f, k, rel_tol=0.2) for f, k in judges):  # about: unequal ends add theirs
        return _NOT_DIVIDED
    if all(math.isclose(f, 1 / k, rel_tol=0.2) for f, k in judges):
        return _DIVIDED_TWICE
    if equal:
        return _NO_FACTOR
    return _SHORT_END if all(one.beyond <= tolerance for one in differing) else _MEAN_OF_MEANS
