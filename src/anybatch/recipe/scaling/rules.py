"""Rules by which the numbers of a recipe go from one batch size to another.

    k = new size / old size

Each rule is a function of one number and k. They are stated for gradients that are averaged over
the batch, and keep, to first order, what a fixed number of *examples* does to the weights:

    an update uses k times the examples        what it moves the weights by: times k
    a moving average of retention r an update  r^k
    the noise of the gradient                  standard deviation / sqrt(k)

None of them touches what is counted in examples: schedules, warm-up, drops.
"""

import math

from anybatch.errors import RecipeError

__all__ = [
    "decoupled_decay",
    "first_order",
    "forgets_all",
    "half_life",
    "linear",
    "noise_size",
    "retention",
    "running_statistics",
    "square_root",
    "squared_sum",
]


def linear(lr: float, k: float) -> float:
    """The rate of SGD, with or without momentum: k lr.

    One update at k lr is k updates at lr, as long as these would hardly change the gradient.

    Condition: not in the first epochs, where weights change fast: warm up from the old rate; and
    up to some size only, 8,192 on ImageNet. Must not touch momentum, a coupled L2 penalty, or the
    grain of batch normalisation.

    Source: Goyal et al. 2017, 1706.02677, section 2.1.
    """
    return k * lr


def square_root(lr: float, k: float) -> float:
    """The rate of Adam and RMSProp: sqrt(k) lr.

    Where noise outweighs the gradient, the root of its second moment falls by sqrt(k), which makes
    the other sqrt(k) of the k that an update needs.

    Condition: noise outweighs the gradient. Goes with `retention` for the betas and `noise_size`
    for epsilon; must not touch a coupled L2 penalty.

    Source: Malladi et al. 2022, 2205.10287, definition 5.2 (RMSProp) and 5.3 (Adam).
    """
    return math.sqrt(k) * lr


def half_life(lr: float, momentum: float, k: float) -> tuple[float, float]:
    """Rate and momentum m of SGD: k lr (1 - m^k) / (1 - m), m^k.

    A gradient moves the weights by lr m^j after j updates, lr / (1 - m) in all. Both stay as they
    were at the same number of examples: m^k keeps the half-life, and the rate the total, times k.

    Condition: that of `linear`, which it is at m = 0.

    Raises:
        RecipeError: m below 0, or 1 and above.

    Source: derived; the total is that of Goyal et al. 2017 and Smith et al. 2018, 1711.00489.
    """
    if not 0 <= momentum < 1:
        raise RecipeError(f"half-life expects a momentum from 0 to below 1, got {momentum:g}.")
    return k * lr * (1 - momentum**k) / (1 - momentum), momentum**k


def retention(r: float, k: float) -> float:
    """What a moving average with one update a batch keeps of itself: r^k.

    For Adam's betas, RMSProp's alpha, and the decay of averages of the weights. Valid for any k;
    k small updates keep just as much.

    Raises:
        RecipeError: r below 0 or above 1.

    Source: Busbridge et al. 2023, 2307.13813, definition 1.2, for averages of the weights; equal
        to `first_order` up to (1 - r)^2.
    """
    if not 0 <= r <= 1:
        raise RecipeError(f"a moving average keeps a share of itself from 0 to 1, got {r:g}.")
    return float(r**k)


def first_order(r: float, k: float) -> float:
    """The same to first order in 1 - r: 1 - k (1 - r).

    Raises:
        RecipeError: k (1 - r) of 1 or more, of which nothing is left to keep.

    Source: Malladi et al. 2022, 2205.10287, definition 5.3.
    """
    if forgets_all(r, k):
        raise RecipeError(
            f"1 - k (1 - r) = {1 - k * (1 - r):.3g} for r = {r:g} and k = {k:g}, expected above 0: "
            f"an average cannot forget more than all of itself in one update. Take r^k = "
            f"{r**k:.4g}, which agrees with it to first order, or a smaller batch."
        )
    return 1 - k * (1 - r)


def forgets_all(r: float, k: float) -> bool:
    """Whether k (1 - r) is 1 or more, up to rounding: 10 (1 - 0.9) is."""
    return k * (1 - r) > 1 - 1e-12


def noise_size(size: float, k: float) -> float:
    """What is measured against the noise of a gradient, such as Adam's epsilon: size / sqrt(k).

    Source: Malladi et al. 2022, 2205.10287, definition 5.3.
    """
    return size / math.sqrt(k)


def squared_sum(squares: float, k: float) -> float:
    """What is measured against a sum of squared gradients over updates, as Adagrad's: / k^2.

    After the same examples there are 1 / k of the squares, each 1 / k as large where it is noise.
    The root of the sum falls by k, so that an update at the same rate moves the weights k times
    as far: Adagrad's rate stays, and its epsilon, beside the root, is divided by k.

    Condition: noise outweighs the gradient. Where the gradient does, its squares stay as large,
    the sum falls by k, and `square_root` is the rule.

    Source: derived, as `square_root`; in agreement with Duchi et al. 2011, theorem 5 and what
        follows it, whose best rate is a size of the weights alone.
    """
    return squares / k**2


def decoupled_decay(decay: float, rate: float, k: float) -> float:
    """AdamW's decay, where the learning rate was multiplied by `rate`: k decay / rate.

    Each update keeps 1 - lr decay of the weights: they are a moving average of the updates over
    1 / (lr decay) updates, which is to stay the same number of examples.

    Must not touch a coupled decay, which is part of the gradient.

    Source: Wang and Aitchison 2024, 2405.13698, section 3.
    """
    return decay * k / rate


def running_statistics(momentum: float, k: float) -> float:
    """The momentum of batch normalisation in torch, the share of the new: 1 - (1 - m)^k.

    Condition: the grain stays, so that statistics are those of as many examples. Running statistics
    take one update a batch.

    Source: `retention`, of 1 - m.
    """
    return 1 - retention(1 - momentum, k)
