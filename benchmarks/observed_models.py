"""Models of `observed_step.py`, and the aims of their ratios."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.zoo import gpt, mlp
from anybatch.zoo.losses import cross_entropy, token_cross_entropy

__all__ = ["AIMS", "CASES", "Case"]

Batch = tuple[Tensor, Tensor]


class LastOutput(nn.Module):
    """LSTM whose last output gives the logits: [B, T, 128] to [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, with GroupNorm.

    Source: He et al. 2016, 1512.03385, section 4.2.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.GroupNorm(32, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(32, width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.GroupNorm(32, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.inner(x))


def resnet18() -> nn.Module:
    """Build ResNet-18 for images of 32x32."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Build two 3x3 convolutions with pooling and two linear layers, for images of 28x28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """Model and batch."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]  # shape of the batch
    vocabulary: int = 0  # of inputs and targets that are tokens
    aim: float  # of a step with norms, over the unobserved step

    @property
    def losses(self) -> Callable[..., Any]:
        """Example losses for `Objective`."""
        return token_cross_entropy if self.vocabulary else cross_entropy

    def batch(self) -> Batch:
        """Return random inputs and targets."""
        if self.vocabulary:
            tokens = torch.randint(self.vocabulary, (self.inputs[0], self.inputs[1] + 1))
            return tokens[:, :-1], tokens[:, 1:]
        return torch.rand(self.inputs), torch.randint(10, self.inputs[:1])


CASES = {
    "MLP 784-512-512-10, B=256": Case(
        make=lambda: mlp([784], [512, 512]), inputs=(256, 784), aim=1.15
    ),
    "CNN 32-64-128-10, B=128": Case(make=cnn, inputs=(128, 1, 28, 28), aim=1.12),
    "ResNet-18, GroupNorm, B=32": Case(make=resnet18, inputs=(32, 3, 32, 32), aim=1.15),
    "GPT d=256, 4 layers, T=128, B=16": Case(
        make=lambda: gpt(256, 256, 4, 4, 128), inputs=(16, 128), vocabulary=256, aim=1.15
    ),
    "GPT d=768, 2 layers, T=256, B=4": Case(
        make=lambda: gpt(256, 768, 2, 12, 256), inputs=(4, 256), vocabulary=256, aim=1.08
    ),
    "LSTM 128-256, T=100, B=32": Case(make=LastOutput, inputs=(32, 100, 128), aim=1.4),
}
AIMS = {"noise": 1.3, "alignment": 1.4, "alignment in 4": 1.4, "clipped": 1.3}
"""Aims for all models, over the unobserved step cut the same way."""
