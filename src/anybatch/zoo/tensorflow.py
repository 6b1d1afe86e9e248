"""Network of TensorFlow's CIFAR-10 tutorial, with two layers that differ from torch's.

    pooling, padding SAME:  out = ceil(n / s),  pad = max((out - 1) s + k - n, 0),
                            floor(pad / 2) of it before, the rest after, all of it -inf
    lrn:                    y_c = x_c / (bias + alpha * sum of x_j^2 over |j - c| <= r)^beta

n, k, s   size, kernel, stride along one side;   c, j  channels;   r  depth_radius

torch pads both ends equally, so on an even side its windows are one pixel further left. torch
divides alpha by the number of channels in a window. And torch's layer pools over the channels in
three dimensions, which takes a quarter of this network's time on a CPU.
"""

from collections import OrderedDict
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.zoo.networks import use_channels_last

__all__ = ["LocalResponseNorm", "MaxPoolSame", "cifar_tutorial"]


def cifar_tutorial(image: int = 24, channels: int = 3, classes: int = 10) -> nn.Module:
    """Build conv, pool, lrn, conv, lrn, pool, dense 384, dense 192, linear.

    The original takes 24x24 crops of 32x32 in three colours, and then has 1,068,298 parameters.
    Its penalty is 0.004 times tf.nn.l2_loss = (1/2) sum w^2 of the two dense layers:
    L2(0.004, on=["local3.weight", "local4.weight"]).

    Example:
        >>> import torch
        >>> cifar_tutorial()(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 10])

    Args:
        image: height and width of the input [B, channels, image, image].
        channels: of the input.
        classes: number of logits.

    Source: tensorflow/models, tutorials/image/cifar10/cifar10.py, inference().
    """
    side = -(-image // 4)  # halved twice, rounded up
    layers: dict[str, nn.Module] = {
        "conv1": _initialize(nn.Conv2d(channels, 64, 5, padding=2), std=0.05, bias=0.0),
        "relu1": nn.ReLU(),
        "pool1": MaxPoolSame(3, stride=2),
        "norm1": LocalResponseNorm(4, bias=1.0, alpha=0.001 / 9, beta=0.75),
        "conv2": _initialize(nn.Conv2d(64, 64, 5, padding=2), std=0.05, bias=0.1),
        "relu2": nn.ReLU(),
        "norm2": LocalResponseNorm(4, bias=1.0, alpha=0.001 / 9, beta=0.75),
        "pool2": MaxPoolSame(3, stride=2),
        "flatten": nn.Flatten(),
        "local3": _initialize(nn.Linear(64 * side * side, 384), std=0.04, bias=0.1),
        "relu3": nn.ReLU(),
        "local4": _initialize(nn.Linear(384, 192), std=0.04, bias=0.1),
        "relu4": nn.ReLU(),
        "softmax_linear": _initialize(nn.Linear(192, classes), std=1 / 192, bias=0.0),
    }
    return use_channels_last(nn.Sequential(OrderedDict(layers)))


@final
class LocalResponseNorm(nn.Module):
    """TensorFlow's local response normalisation across channels.

    Args:
        depth_radius: r, channels on each side.
        bias, alpha, beta: as in the equation.

    Source: TensorFlow, tf.nn.local_response_normalization.
    """

    def __init__(self, depth_radius: int, bias: float, alpha: float, beta: float) -> None:
        super().__init__()
        self.depth_radius = depth_radius
        self.bias = bias
        self.alpha = alpha
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W]; the shape stays."""
        channels, r = x.shape[1], self.depth_radius
        near = x.new_ones(channels, channels).triu(-r).tril(r)  # 1 where |j - c| <= r
        sums = F.conv2d(x.square(), near[:, :, None, None])
        return x * (self.bias + self.alpha * sums) ** -self.beta


@final
class MaxPoolSame(nn.Module):
    """Max pooling with TensorFlow's padding SAME.

    Args:
        kernel: rows and columns of a window.
        stride: rows and columns from one window to the next.

    Source: TensorFlow, tf.nn.max_pool; "Notes on padding" of tf.nn.
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Pool x [B, C, H, W] to [B, C, ceil(H / stride), ceil(W / stride)]."""
        rows, columns = (self._padding(size) for size in x.shape[-2:])
        padded = F.pad(x, (*columns, *rows), value=-float("inf"))
        return F.max_pool2d(padded, self.kernel, self.stride)

    def _padding(self, size: int) -> tuple[int, int]:
        num_windows = -(-size // self.stride)
        missing = max((num_windows - 1) * self.stride + self.kernel - size, 0)
        return missing // 2, missing - missing // 2


def _initialize(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> nn.Module:
    """Draw weights from a normal distribution of deviation std, cut off at 2 std. Set the bias."""
    assert layer.bias is not None
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.constant_(layer.bias, bias)
    return layer
