"""Files that are sorted by class are no trap: splits and batches are balanced all the same.

Oracle: the hypergeometric distribution of a class in a batch drawn without replacement, whose
mean is B p and whose variance is B p (1 - p) (N - B) / (N - 1). Some thousand counts are compared;
6 standard deviations leave a false alarm one chance in 10^5.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anybatch.data import Examples, OrderWithin, load_digits, load_fashion_mnist, split
from anybatch.data.idx import DEBIAN
from anybatch.order import Order


def fashion() -> Examples:
    if not Path(DEBIAN).is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return load_fashion_mnist("test")


def sorted_by_class(examples: Examples) -> Examples:
    return examples.select(examples.targets.argsort(stable=True))


def largest_deviation(targets: Tensor, batches: list[Tensor]) -> float:
    """Measure how far a class count in a batch is from its mean, in standard deviations."""
    counts = torch.stack([torch.bincount(targets[batch], minlength=10) for batch in batches])
    everyone = torch.cat(batches)
    total, size = len(everyone), len(batches[0])
    p = torch.bincount(targets[everyone], minlength=10) / total
    deviation = (size * p * (1 - p) * (total - size) / (total - 1)).sqrt()
    return float(((counts - size * p).abs() / deviation).max())


@pytest.mark.parametrize("load", [load_digits, fashion])
def test_batches_of_a_sorted_file_are_balanced(load) -> None:
    targets = sorted_by_class(load()).targets
    assert (targets.diff() >= 0).all()
    parts = split(targets, 0.2, seed=1)
    shares = torch.bincount(targets[parts.held_out]) / torch.bincount(targets)
    assert shares.sub(0.2).abs().max() < 0.5 / 150  # rounded: half an example of a class
    order = Order(len(parts.train), batch_size=100, seed=2, last="drop")
    within = OrderWithin(order, parts.train)
    for epoch in range(3):
        steps = range(order.num_steps(1) * epoch, order.num_steps(1) * (epoch + 1))
        assert largest_deviation(targets, [within.indices(step) for step in steps]) < 6


def test_batches_in_the_order_of_the_file_are_not() -> None:  # the control
    targets = sorted_by_class(load_digits()).targets
    batches = list(torch.arange(1700).split(100))
    assert largest_deviation(targets, batches) > 20
