"""Caffe's LeNet, with its initial weights and pooling, and Caffe's SGD.

    v <- m v + lr (g + d w),    w <- w - v

g   gradient;  w  weights;  v  velocity, 0 at the start
m   momentum;  d  weight decay, on whatever parameters the group holds

Caffe's velocity contains the learning rate. torch has v <- m v + (g + d w), w <- w - lr v. At a
constant rate both make the same path, since Caffe's v is lr times torch's. When the rate drops,
torch's weights slow down at once. Caffe's go on at the old rate, which fades by m an update.
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.errors import ModelError
from anybatch.zoo.networks import lenet, use_channels_last

__all__ = ["CaffeSGD", "caffe_lenet"]


def caffe_lenet(image: int = 28, classes: int = 10) -> nn.Module:
    """Build `lenet` with Caffe's pooling, which rounds up, and Caffe's initial weights.

    Weights start uniform in +-sqrt(3 / fan_in), the filler "xavier"; biases start at 0. From 28x28
    every map is even, so rounding up changes nothing.

    Example:
        >>> caffe_lenet(image=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Args:
        image: height and width of the input [B, 1, image, image].
        classes: number of logits.

    Source: Caffe, examples/mnist/lenet_train_test.prototxt; XavierFiller in filler.hpp;
        PoolingLayer::Reshape.
    """
    model = lenet(image, classes, ceil_mode=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            limit = sqrt(3 / module.weight[0].numel())
            nn.init.uniform_(module.weight, -limit, limit)
            nn.init.zeros_(module.bias)
    return use_channels_last(model)


@final
class CaffeSGD(Optimizer):
    """SGD along a velocity that contains the learning rate.

    Caffe's LeNet moves biases at twice the rate and decays them like weights. So it needs a
    parameter group with its own lr, and no group without weight_decay.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> w.grad = torch.ones(1)
        >>> CaffeSGD([w], lr=0.5).step()
        >>> w.item()
        0.5

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: m, from 0 to below 1.
        weight_decay: d; the same as an L2 penalty of strength d, but added after any clipping.

    Raises:
        ModelError: a value out of its range.

    Source: Caffe, SGDSolver::Regularize and ComputeUpdateValue in sgd_solver.cpp.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: one gradient an update
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["velocity"] = torch.zeros_like(w)
                g = w.grad.add(w, alpha=group["weight_decay"])
                w -= state["velocity"].mul_(group["momentum"]).add_(g, alpha=group["lr"])


def _check(group: dict[str, Any]) -> None:
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if not (0 <= lr < float("inf") and 0 <= momentum < 1 and 0 <= decay < float("inf")):
        raise ModelError(
            f"CaffeSGD got lr = {lr}, weight_decay = {decay}, momentum = {momentum}. Expected lr "
            f"and weight_decay of at least 0, and momentum from 0 to below 1."
        )
