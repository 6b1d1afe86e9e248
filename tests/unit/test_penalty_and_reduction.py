"""Three ways to combine a penalty with a reduction, at three batch sizes.

    reduce_mean(loss + beta reg)  =  Mean + beta reg      the ratio of its gradient to the data's
                                                          does not depend on B
    reduce_sum(loss + beta reg)   =  Sum + B beta reg     nor does this one; it is the same
    reduce_sum(loss) + beta reg   =  Sum + beta reg       falls as 1 / B

The oracle is autograd on the left side as it is written, reg = tf.nn.l2_loss = (1/2) sum w^2. The
batches of 64 and 256 are one of 16 repeated, so that their mean gradient is exactly the same and
the ratios can be compared without noise. All is float64: sums of at most 256 terms, each rounded
to 1e-16, so 1e-13 leaves room, and no wrong factor comes near it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab

BETA = 0.01
SIZES = (16, 64, 256)
TOLERANCE = 1e-13


def network() -> nn.Module:
    """Two layers, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch_of(size: int) -> tuple[Tensor, Tensor]:
    """16 examples, repeated."""
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inputs.repeat(size // 16, 1), inputs[:, :3].argmax(1).repeat(size // 16)


def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


def l2_loss(model: nn.Module) -> Tensor:
    """(1/2) sum w^2 over the weights, not the biases."""
    return sum(p.square().sum() for p in model.parameters() if p.ndim == 2) / 2


@dataclass(frozen=True)
class Way:
    """An expression in TensorFlow's manner, and what states it here."""

    text: Callable[[Tensor, Tensor], Tensor]  # of the losses [B] and reg
    reduction: ab.Mean | ab.Sum
    strength: Callable[[int], float]  # of the batch size


WAYS = {
    "reduce_mean(loss + beta reg)": Way(
        lambda losses, reg: (losses + BETA * reg).mean(), ab.Mean(), lambda size: BETA
    ),
    "reduce_sum(loss + beta reg)": Way(
        lambda losses, reg: (losses + BETA * reg).sum(), ab.Sum(), lambda size: size * BETA
    ),
    "reduce_sum(loss) + beta reg": Way(
        lambda losses, reg: losses.sum() + BETA * reg, ab.Sum(), lambda size: BETA
    ),
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def by_autograd(way: Way, size: int) -> tuple[float, Tensor]:
    """Value and gradient of the expression as written."""
    model = network()
    value = way.text(example_losses(model, batch_of(size)), l2_loss(model))
    value.backward()
    return value.item(), flat(model)


def by_anybatch(reduction: ab.Mean | ab.Sum, strength: float, size: int) -> tuple[float, Tensor]:
    """Value and gradient of reduction + L2(strength)."""
    model = network()
    objective = ab.Objective(example_losses, reduction=reduction, penalty=ab.L2(strength))
    gradient = ab.batch_gradient(model, objective, batch_of(size))
    return gradient.loss.item(), flat(model)


def distance(result: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((result - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_each_expression_is_a_reduction_and_a_penalty(way: Way, size: int) -> None:
    value, gradient = by_autograd(way, size)
    result, found_gradient = by_anybatch(way.reduction, way.strength(size), size)
    assert result == pytest.approx(value, rel=TOLERANCE)
    assert distance(found_gradient, gradient) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_they_are_three_and_not_one(size: int) -> None:  # the control
    mean, total, once = WAYS.values()
    for way, strength in ((total, BETA), (once, size * BETA), (mean, size * BETA)):
        _, gradient = by_autograd(way, size)
        _, mistaken = by_anybatch(way.reduction, strength, size)
        assert distance(mistaken, gradient) > 0.01


def ratio(way: Way, size: int) -> float:
    """Norm of the penalty's part of the gradient over that of the data's."""
    _, data = by_anybatch(way.reduction, 0.0, size)
    _, both = by_anybatch(way.reduction, way.strength(size), size)
    return float((both - data).norm() / data.norm())


def test_the_ratio_of_penalty_to_data_is_constant_twice_and_falls_once() -> None:
    mean, total, once = ([ratio(way, size) for size in SIZES] for way in WAYS.values())
    # a difference of two gradients, up to 7,000 times as long as itself, loses four digits
    assert mean == pytest.approx([mean[0]] * 3, rel=1e-9)
    assert total == pytest.approx(mean, rel=1e-9)
    assert once == pytest.approx([mean[0] / size for size in SIZES], rel=1e-9)
    assert once[0] > 3.9 * once[1] > 15 * once[2]  # control: it is not constant
