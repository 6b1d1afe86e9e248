"""Models of the named systems: their sizes, and the numbers that they start from.

Bounds and variances are those of the originals, written out here; a statistic of n draws may lie
4 of its standard errors from them.
"""

from collections.abc import Callable
from math import erf, exp, log, pi, sqrt

import pytest
import torch
from torch import Tensor, nn

from anybatch import zoo


def start_model(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose start does not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def is_uniform(weight: Tensor, limit: float) -> bool:
    """Return whether numbers look drawn from [-bound, bound]: their extremes, and their spread."""
    largest, spread = weight.abs().max().item(), weight.std().item()
    # the kurtosis of a uniform variable is 1.8, so that std varies by sqrt(0.8 / 4n) of itself
    tolerance = 4 * sqrt(0.2 / weight.numel())
    edge = 0.9 * limit  # none of n >= 100 draws beyond it: 0.9^100, under 3 in 100,000
    return edge < largest <= limit and abs(spread * sqrt(3) / limit - 1) < tolerance


@pytest.mark.parametrize(
    ("make", "inputs", "num_parameters"),
    [
        (lambda: zoo.softmax_regression(zeros=True), (1, 8, 8), 65 * 10),
        # as published: "1,068,298 learnable parameters"
        (lambda: zoo.cifar_tutorial(), (3, 24, 24), 1_068_298),
        # 5x5 conv 64, 5x5x64 conv 64, 64 maps of 2x2 to 384, 192, 10
        (lambda: zoo.cifar_tutorial(8, 1), (1, 8, 8), 1664 + 102464 + 98688 + 73920 + 1930),
        (lambda: zoo.cifar_tutorial(7, 1, 5), (1, 7, 7), 1664 + 102464 + 98688 + 73920 + 965),
        (lambda: zoo.caffe_lenet(), (1, 28, 28), 520 + 25050 + 801 * 500 + 5010),
        # 17 -> 13, pooled to 7 -> 3, pooled to 2; rounding down there would be 6 -> 2 -> 1
        (lambda: zoo.caffe_lenet(17), (1, 17, 17), 520 + 25050 + 201 * 500 + 5010),
        (lambda: zoo.tanh_mlp([28, 28]), (1, 28, 28), 785 * 500 + 501 * 10),
        (lambda: zoo.sigmoid_mlp([400]), (400,), 25 * 401 + 10 * 26),  # the course's 10,285
        # conv 9w, then (9 + 9) 16^2, 1.5 (9 + 18) 16^2 ... with 2 numbers a channel in each norm
        (lambda: zoo.resnet_small(), (1, 8, 8), 144 + 32 + 4672 + 14528 + 57728 + 650),
        (lambda: zoo.resnet_small(3, 5), (3, 28, 28), 432 + 32 + 4672 + 14528 + 57728 + 325),
        (lambda: zoo.resnet_small(stride=2), (1, 28, 28), 144 + 32 + 4672 + 14528 + 57728 + 650),
    ],
)
def test_a_network_has_the_parameters_and_outputs_of_its_original(
    make: Callable[[], nn.Module], inputs: tuple[int, ...], num_parameters: int
) -> None:
    model = make()
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    classes = list(model.parameters())[-1].numel()
    assert model(torch.rand(3, *inputs)).shape == (3, classes)


@pytest.mark.parametrize(
    "make", [lambda: zoo.softmax_regression([5], 7, zeros=True), lambda: zoo.tanh_mlp([5], 6, 7)]
)
def test_a_model_with_zeros_on_top_gives_every_class_the_same_probability(
    make: Callable[[], nn.Module],
) -> None:
    losses = zoo.cross_entropy(make(), (torch.randn(4, 5), torch.arange(4))).values
    torch.testing.assert_close(losses, torch.full((4,), log(7)), rtol=1e-6, atol=0)  # float32


def test_without_zeros_classes_differ_from_the_start() -> None:  # the control
    model = start_model(lambda: zoo.softmax_regression([5], 7))
    losses = zoo.cross_entropy(model, (torch.ones(4, 5), torch.arange(4))).values
    assert (losses - log(7)).abs().max() > 0.01


def test_caffe_starts_uniform_by_fan_in_with_biases_at_0() -> None:
    weights = list(start_model(zoo.caffe_lenet).parameters())[0::2]
    biases = list(start_model(zoo.caffe_lenet).parameters())[1::2]
    for weight, fan_in in zip(weights, [25, 500, 800, 500], strict=True):
        assert is_uniform(weight, sqrt(3 / fan_in))
    assert all(not bias.any() for bias in biases)


def test_the_statistic_tells_caffes_filler_from_torchs() -> None:  # the control
    for weight, fan_in in zip(
        list(start_model(zoo.lenet).parameters())[0::2], [25, 500, 800, 500], strict=True
    ):
        assert is_uniform(weight, sqrt(1 / fan_in))  # torch's default bound
        assert not is_uniform(weight, sqrt(3 / fan_in))
    normal = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    assert not is_uniform(normal / sqrt(3), 1.0)  # the right spread, the wrong shape


def test_the_tanh_layer_starts_uniform_by_both_fans() -> None:
    model = start_model(lambda: zoo.tanh_mlp([8, 8]))
    assert is_uniform(model[1].weight, sqrt(6 / (64 + 500)))
    assert not is_uniform(model[1].weight, sqrt(3 / 64))  # control: another rule
    assert not model[1].bias.any()


def test_the_courses_weights_and_biases_start_within_twelve_hundredths() -> None:
    model = start_model(lambda: zoo.sigmoid_mlp([400]))
    assert is_uniform(model[1].weight, 0.12)
    assert is_uniform(model[3].weight, 0.12)
    for bias in (model[1].bias, model[3].bias):
        assert 0 < bias.abs().max() <= 0.12


def test_tensorflows_weights_start_normal_cut_off_at_two_deviations() -> None:
    model = start_model(zoo.cifar_tutorial)
    # a normal variable kept within 2 deviations: variance 1 - 4 phi(2) / P(|z| < 2)
    shrunk = sqrt(1 - 4 * exp(-2) / sqrt(2 * pi) / erf(sqrt(2)))
    stated = {"conv1": 0.05, "conv2": 0.05, "local3": 0.04, "local4": 0.04}
    for name, std in (stated | {"softmax_linear": 1 / 192}).items():
        weight = model.get_submodule(name).weight
        assert weight.abs().max() <= 2 * std
        # its kurtosis is under 3, so that std varies by less than sqrt(1 / 2n) of itself
        tolerance = 4 * sqrt(0.5 / weight.numel())
        assert weight.std().item() == pytest.approx(shrunk * std, rel=tolerance)
        assert shrunk < 1 - tolerance  # control: a normal variable not cut off would fail
    biases = {name: layer.bias for name, layer in model.named_children() if hasattr(layer, "bias")}
    for name, value in {"conv1": 0, "conv2": 0.1, "local3": 0.1, "local4": 0.1}.items():
        assert (biases[name] == value).all()
    assert not biases["softmax_linear"].any()


def test_residual_blocks_start_as_their_shortcuts() -> None:
    model = start_model(zoo.resnet_small)
    blocks = [module for module in model if hasattr(module, "norm2")]
    assert [block.norm2.weight.any().item() for block in blocks] == [False] * 3
    assert all((block.norm1.weight == 1).all() for block in blocks)
    x = torch.randn(4, 16, 6, 6)
    assert torch.equal(blocks[0](x), x.relu())
    blocks[0].norm2.weight.data.fill_(1.0)  # control: torch's default does not
    assert not torch.equal(blocks[0](x), x.relu())


def test_a_stride_of_the_first_convolution_leaves_a_quarter_of_the_pixels() -> None:
    x = torch.randn(1, 1, 28, 28)
    assert zoo.resnet_small(stride=2)[0](x).shape == (1, 16, 14, 14)
    assert zoo.resnet_small()[0](x).shape == (1, 16, 28, 28)


def test_convolutions_of_the_residual_network_start_normal_by_fan_out() -> None:
    model = start_model(zoo.resnet_small)
    for block, width in zip(list(model)[3:6], [16, 32, 64], strict=True):
        weight = block.conv2.weight
        tolerance = 4 * sqrt(0.5 / weight.numel())
        assert weight.std().item() == pytest.approx(sqrt(2 / (9 * width)), rel=tolerance)
    linear = model[-1]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=4 * sqrt(0.5 / 640))
    assert not linear.bias.any()
