"""Moving averages of the loss and its parts, for curves that can be read.

a <- s a + (1 - s) x,    a = the first x to begin with;    s the smoothing
"""

import math
from collections.abc import Mapping

__all__ = ["smoothed"]


def smoothed(
    averages: Mapping[str, float], values: Mapping[str, float | None], smoothing: float
) -> dict[str, float]:
    """The averages after one more value of each.

    Args:
        averages: before it, by name.
        values: by name; one that is missing or not finite leaves its average as it is.
        smoothing: s, from 0 (the values themselves) to under 1.

    Source: the CIFAR-10 tutorial of TensorFlow logs each loss raw and as such an average, s = 0.9.
    """
    after = dict(averages)
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            before = after.get(name)
            after[name] = value if before is None else smoothing * before + (1 - smoothing) * value
    return after
