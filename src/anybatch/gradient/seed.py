"""Weight with which the examples of a part go back where R is linear.

In one pass c = 1 / (sum of counts) is known before the first backward pass only where there are no
counts: the number of examples is. With counts a part goes back with a power of two near c instead,

    seed s = 2^round(log2(1 / (B * mean count of the part))),    G = c * sum over parts G_part / s

Multiplying by powers of two changes no bit, and gradients keep the size that they have uncut: so do
the overflows of half precision, and what hooks on activations see.
"""

import math

from anybatch.example_losses import ExampleLosses
from anybatch.reductions import Reduction

__all__ = ["seed_of"]


def seed_of(total: int, reduction: Reduction, term: ExampleLosses, *, is_common: bool) -> float:
    """Choose the weight with which the examples of a part go back.

    Args:
        total: examples of the whole batch.
        is_common: whether it must be the same for all parts, so that no counts of one enter.
    """
    if term.counts is None:
        factor = reduction.factor(total, total)
        assert factor is not None
        return factor
    mean = 1.0 if is_common else term.counts.double().mean().item() or 1.0
    factor = reduction.factor(total * mean, total)
    assert factor is not None
    if factor == 0 or not math.isfinite(factor):
        return 1.0
    return math.copysign(2.0 ** round(math.log2(abs(factor))), factor)
