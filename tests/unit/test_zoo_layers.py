"""Layers that the originals have otherwise than torch, against their formulas in plain loops."""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anybatch import zoo
from anybatch.zoo.tensorflow import LocalResponseNorm, MaxPoolSame


def numbers(*shape: int) -> torch.Tensor:
    """Reproducible numbers, all below 0, so that padding with 0 would win."""
    return -torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1


def lrn_by_hand(x: np.ndarray, radius: int, bias: float, alpha: float, beta: float) -> np.ndarray:
    """TensorFlow's formula: output = input / (bias + alpha * sqr_sum) ** beta."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        window = x[:, max(c - radius, 0) : c + radius + 1]
        y[:, c] = x[:, c] / (bias + alpha * (window**2).sum(1)) ** beta
    return y


def test_lrn_is_tensorflows() -> None:
    x = numbers(2, 12, 3, 3)
    wanted = torch.from_numpy(lrn_by_hand(x.numpy(), 4, 1.0, 0.5, 0.75))
    torch.testing.assert_close(
        LocalResponseNorm(4, 1.0, 0.5, 0.75)(x), wanted, rtol=1e-13, atol=0
    )  # float64
    as_if_torchs = nn.LocalResponseNorm(9, alpha=0.5, beta=0.75, k=1.0)  # control: averaged
    assert not torch.allclose(as_if_torchs(x), wanted, rtol=0.1)
    as_if_size = nn.LocalResponseNorm(4, alpha=0.5 * 4, beta=0.75, k=1.0)  # control: not a radius
    assert not torch.allclose(as_if_size(x), wanted, rtol=0.1)


def same_windows(size: int, kernel: int, stride: int) -> Iterator[range]:
    """Return the indices in each window of padding SAME, by the rule in TensorFlow's notes."""
    rest = size % stride
    missing = max(kernel - (rest if rest else stride), 0)
    for start in range(-(missing // 2), size - missing // 2, stride):
        yield range(max(start, 0), min(start + kernel, size))


def pooled_by_hand(
    x: torch.Tensor, windows: Callable[[int], Iterator[range]]
) -> list[list[list[float]]]:
    """Return the largest number in each window of each map of one example."""
    return [
        [
            [max(plane[r, c].item() for r, c in product(rows, columns)) for columns in windows(w)]
            for rows in windows(h)
        ]
        for plane, (h, w) in ((plane, plane.shape) for plane in x)
    ]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (3, 1), (5, 3), (2, 3)])
def test_pooling_with_padding_same_is_tensorflows(kernel: int, stride: int) -> None:
    for h, w in product([4, 5, 6, 7], [4, 6, 9]):
        x = numbers(2, h, w)
        wanted = pooled_by_hand(x, lambda size: same_windows(size, kernel, stride))
        assert MaxPoolSame(kernel, stride)(x[None])[0].tolist() == wanted  # a choice: exact


def test_on_an_even_map_the_padding_lies_after() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert MaxPoolSame(3, 2)(x).tolist() == [[[[10.0, 11.0], [14.0, 15.0]]]]
    both_ends = nn.MaxPool2d(3, 2, padding=1)(x)  # control: torch's, of the same shape
    assert both_ends.tolist() == [[[[5.0, 7.0], [13.0, 15.0]]]]
    zeros = F.max_pool2d(F.pad(numbers(1, 1, 4, 4), (0, 1, 0, 1)), 3, 2)  # control: not -inf
    assert not torch.equal(zeros, MaxPoolSame(3, 2)(numbers(1, 1, 4, 4)))


def cut_windows(size: int) -> Iterator[range]:
    """Caffe's: windows of 2 from every second place, the last one cut off at the edge."""
    for start in range(0, size, 2):
        yield range(start, min(start + 2, size))


def test_pooling_that_rounds_up_keeps_the_last_row_and_column() -> None:
    model = zoo.caffe_lenet(17)
    for pool, size in ((model[1], 13), (model[3], 3)):
        x = numbers(2, size, size)
        assert pool(x[None])[0].tolist() == pooled_by_hand(x, cut_windows)
        down = nn.MaxPool2d(2)(x[None])  # control: torch's default leaves them out
        assert down.shape[-1] == size // 2


def test_the_cifar_network_runs_its_layers_in_the_order_of_the_original() -> None:
    model = zoo.cifar_tutorial(6, 1, 3).double()
    p = dict(model.named_parameters())
    x = numbers(2, 1, 6, 6)

    def pooled(y: torch.Tensor) -> torch.Tensor:
        maps = [pooled_by_hand(m, lambda size: same_windows(size, 3, 2)) for m in y.detach()]
        return torch.tensor(maps, dtype=torch.float64)

    def normalise(y: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(lrn_by_hand(y.detach().numpy(), 4, 1.0, 0.001 / 9, 0.75))

    y = F.conv2d(x, p["conv1.weight"], p["conv1.bias"], padding="same").relu()
    y = normalise(pooled(y))  # first pooled, then normalised
    y = F.conv2d(y, p["conv2.weight"], p["conv2.bias"], padding="same").relu()
    last = normalise(y)  # first normalised, then pooled
    y = pooled(last).flatten(1)
    for name in ("local3", "local4"):
        y = (y @ p[f"{name}.weight"].T + p[f"{name}.bias"]).relu()
    y = y @ p["softmax_linear.weight"].T + p["softmax_linear.bias"]
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-14)  # float64, 2,304 terms a sum
    model.norm2 = nn.Identity()  # control
    assert not torch.allclose(model(x), y, rtol=1e-6)


@pytest.mark.parametrize(("make", "squash"), [(zoo.tanh_mlp, np.tanh), (zoo.sigmoid_mlp, None)])
def test_a_perceptron_is_its_formula(make: Callable[..., nn.Module], squash: Callable) -> None:
    squash = squash or (lambda z: 1 / (1 + np.exp(-z)))
    model = make([2, 3], 4, 5).double()
    for parameter in model.parameters():
        parameter.data = numbers(*parameter.shape)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.parameters())
    x = -numbers(3, 2, 3) - 1
    wanted = squash(x.numpy().reshape(3, 6) @ w1.T + b1) @ w2.T + b2
    np.testing.assert_allclose(model(x).detach().numpy(), wanted, rtol=1e-13)  # float64
