"""Rules that take the numbers of a recipe from one batch size to another.

    k = new size / old size

Each rule is a function of one number and k. They are stated for gradients that are averaged over
the batch. To first order, they keep what a fixed number of *examples* does to the weights:

    an update uses k times the examples        it moves the weights k times as far
    a moving average has decay r an update     r^k
    the noise of the gradient                  standard deviation / sqrt(k)

What is counted in examples stays: schedules, warm-up, drops.
"""

import math

from anybatch.errors import RecipeError

__all__ = [
    "adamw_decay",
    "first_order",
    "forgets_all",
    "half_life",
    "linear",
    "noise_size",
    "retention",
    "running_statistics",
    "square_root",
    "sum_of_squares",
]


def linear(lr: float, k: float) -> float:
    """Rescale the rate of SGD, with or without momentum: k lr.

    One update at k lr is k updates at lr, as long as these would hardly change the gradient.

    Condition: not in the first epochs, where weights change fast: warm up from the old rate. And
    only up to some size, 8,192 on ImageNet. Momentum, a coupled L2 penalty and the grain of batch
    normalisation must stay.

    Example:
        >>> linear(0.1, k=4)
        0.4

    Source: Goyal et al. 2017, 1706.02677, section 2.1.
    """
    return k * lr


def square_root(lr: float, k: float) -> float:
    """Rescale the rate of Adam and RMSProp: sqrt(k) lr.

    Where noise outweighs the gradient, the root of its second moment falls by sqrt(k), which makes
    the other sqrt(k) of the k that an update needs.

    Condition: noise outweighs the gradient. Goes with `retention` for the betas and `noise_size`
    for epsilon. A coupled L2 penalty must stay.

    Example:
        >>> square_root(0.1, k=4)
        0.2

    Source: Malladi et al. 2022, 2205.10287, definition 5.2 (RMSProp) and 5.3 (Adam).
    """
    return math.sqrt(k) * lr


def half_life(lr: float, momentum: float, k: float) -> tuple[float, float]:
    """Rescale rate and momentum m of SGD: k lr (1 - m^k) / (1 - m), m^k.

    A gradient moves the weights by lr m^j after j updates, lr / (1 - m) in total. Over the same
    examples both stay: m^k keeps the half-life, and the rate keeps the total, times k.

    Condition: that of `linear`. At m = 0 the two rules are the same.

    Example:
        >>> half_life(1.0, momentum=0.5, k=2)
        (3.0, 0.25)

    Raises:
        RecipeError: m below 0, or 1 and above.

    Source: derived; the total is that of Goyal et al. 2017 and Smith et al. 2018, 1711.00489.
    """
    if not 0 <= momentum < 1:
        raise RecipeError(f"half-life expects a momentum from 0 to below 1, got {momentum:g}.")
    return k * lr * (1 - momentum**k) / (1 - momentum), momentum**k


def retention(r: float, k: float) -> float:
    """Rescale the decay of a moving average with one update a batch: r^k.

    For Adam's betas, RMSProp's alpha, and the decay of averages of the weights. Valid for any k:
    k small updates keep just as much.

    Example:
        >>> round(retention(0.9, k=4), 4)
        0.6561

    Raises:
        RecipeError: r below 0 or above 1.

    Source: Busbridge et al. 2023, 2307.13813, definition 1.2, for averages of the weights; equal
        to `first_order` up to (1 - r)^2.
    """
    if not 0 <= r <= 1:
        raise RecipeError(f"the decay of a moving average is {r:g}. It should be from 0 to 1.")
    return float(r**k)


def first_order(r: float, k: float) -> float:
    """Rescale the decay of a moving average to first order in 1 - r: 1 - k (1 - r).

    Raises:
        RecipeError: k (1 - r) is 1 or more, which leaves nothing of the average.

    Source: Malladi et al. 2022, 2205.10287, definition 5.3.
    """
    if forgets_all(r, k):
        raise RecipeError(
            f"1 - k (1 - r) = {1 - k * (1 - r):.3g} for r = {r:g} and k = {k:g}. It must be above "
            f"0: an average cannot forget more than all of itself in one update. Use r^k = "
            f"{r**k:.4g}, which agrees with it to first order, or a smaller batch."
        )
    return 1 - k * (1 - r)


def forgets_all(r: float, k: float) -> bool:
    """Return whether k (1 - r) is 1 or more, up to rounding: 10 (1 - 0.9) is."""
    return k * (1 - r) > 1 - 1e-12


def noise_size(size: float, k: float) -> float:
    """Rescale a number that is compared with the noise of a gradient, such as Adam's epsilon.

        size / sqrt(k)

    Source: Malladi et al. 2022, 2205.10287, definition 5.3.
    """
    return size / math.sqrt(k)


def sum_of_squares(squares: float, k: float) -> float:
    """Rescale a number that is compared with a sum of squared gradients, as Adagrad's: / k^2.

    After the same examples there are 1 / k of the squares, each 1 / k as large where it is noise.
    The root of the sum falls by k, so an update at the same rate moves the weights k times as far.
    Adagrad's rate stays; its epsilon, which is added to the root, is divided by k.

    Condition: noise outweighs the gradient. Where the gradient does, its squares stay as large,
    the sum falls by k, and `square_root` is the rule.

    Source: derived, as `square_root`; in agreement with Duchi et al. 2011, theorem 5 and what
        follows it, whose best rate is a size of the weights alone.
    """
    return squares / k**2


def adamw_decay(decay: float, rate: float, k: float) -> float:
    """Rescale AdamW's decay, where the learning rate was multiplied by `rate`: k decay / rate.

    Each update keeps 1 - lr decay of the weights. So they are a moving average of the updates over
    1 / (lr decay) updates, which should stay the same number of examples.

    A coupled decay is part of the gradient, and must stay.

    Source: Wang and Aitchison 2024, 2405.13698, section 3.
    """
    return decay * k / rate


def running_statistics(momentum: float, k: float) -> float:
    """Rescale torch's momentum of batch normalisation: 1 - (1 - m)^k.

    That momentum is the weight of the new statistics.

    Condition: the grain stays, so that statistics are those of as many examples. Running statistics
    take one update a batch.

    Source: `retention`, of 1 - m.
    """
    return 1 - retention(1 - momentum, k)
