"""Small residual network, with the initial weights of Goyal et al.

    block:  y = relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))

The scale of norm2 starts at 0, so at first every block returns relu(shortcut(x)). Batch
normalisation couples examples: the objective states the grain whose statistics it uses, 32 in the
original whatever the batch size.
"""

from itertools import pairwise
from typing import final

from torch import Tensor, nn

from anybatch.zoo.networks import use_channels_last

__all__ = ["ResidualBlock", "resnet_small"]


def resnet_small(
    channels: int = 1, classes: int = 10, width: int = 16, stride: int = 1
) -> nn.Module:
    """Build conv, norm, ReLU; three residual blocks of width, 2 width, 4 width; mean; linear.

    The second and third block halve the image: 28x28 goes 28 -> 14 -> 7, 8x8 goes 8 -> 4 -> 2.

    Example:
        >>> import torch
        >>> resnet_small(width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Args:
        channels: of the input [B, channels, H, W], of any size.
        classes: number of logits.
        width: channels of the first block.
        stride: of the first convolution. 2 leaves a quarter of the pixels, and of the time.

    Source: He et al. 2016, 1512.03385, section 4.2, with one block a stage and projections where
        the shape changes; the start is that of Goyal et al. 2017, 1706.02677, section 5.1.
    """
    widths = [width, width, 2 * width, 4 * width]
    blocks = [ResidualBlock(a, b, stride=1 if a == b else 2) for a, b in pairwise(widths)]
    linear = nn.Linear(widths[-1], classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(
        _make_convolution(channels, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        linear,
    )
    return use_channels_last(model)


@final
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to a shortcut.

    Args:
        channels: of the input.
        width: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _make_convolution(channels, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _make_convolution(width, width, 3, stride=1)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if channels != width or stride != 1:
            self.shortcut = nn.Sequential(
                _make_convolution(channels, width, 1, stride), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, channels, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]."""
        inner = self.norm1(self.conv1(x)).relu()
        y: Tensor = self.shortcut(x) + self.norm2(self.conv2(inner))
        return y.relu()


def _make_convolution(channels: int, width: int, kernel: int, stride: int) -> nn.Conv2d:
    """Make a convolution without bias, since a norm follows. Weights have variance 2 / fan_out."""
    conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
