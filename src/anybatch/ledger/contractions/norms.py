"""Normalisation layers and PReLU: layer, group, instance, batch and RMS norm.

    y_i = w * n(x_i) + b,      g_i = sum of d_i * n(x_i)  (of w),    sum of d_i  (of b)

n has no parameters; the backward pass computes it again from x. Batch normalisation in training
mixes the examples of a batch. Its g_i are right only if x has no gradient.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction, Detach, PerExample, RuleResult

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "prelu", "rms_norm"]

Normalize = Callable[[Tensor], Tensor]
"""n(x), without parameters."""


def layer_norm(
    detach: Detach,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> RuleResult:
    """Compute `torch.layer_norm`."""
    shape = list(normalized_shape)
    constants = _detach(detach, weight), _detach(detach, bias)
    output = torch.layer_norm(input, shape, *constants, eps)

    def normalize(x: Tensor) -> Tensor:
        return torch.layer_norm(x, shape, None, None, eps)

    return _make_uses(output, input, weight, bias, normalize, ndim=len(shape), num_repeated=0)


def rms_norm(
    detach: Detach,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> RuleResult:
    """Compute `torch.rms_norm`."""
    shape = list(normalized_shape)
    output = torch.rms_norm(input, shape, _detach(detach, weight), eps)

    def normalize(x: Tensor) -> Tensor:
        return torch.rms_norm(x, shape, None, eps)

    return _make_uses(output, input, weight, None, normalize, ndim=len(shape), num_repeated=0)


def group_norm(
    detach: Detach,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> RuleResult:
    """Compute `torch.group_norm`."""
    constants = _detach(detach, weight), _detach(detach, bias)
    output = torch.group_norm(input, num_groups, *constants, eps)

    def normalize(x: Tensor) -> Tensor:
        return torch.group_norm(x, num_groups, None, None, eps)

    return _make_channel_uses(output, input, weight, bias, normalize)


def instance_norm(
    detach: Detach,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> RuleResult:
    """Compute `torch.instance_norm`."""
    settings: dict[str, Any] = {"momentum": momentum, "eps": eps, "cudnn_enabled": cudnn_enabled}
    function = partial(torch.instance_norm, use_input_stats=use_input_stats, **settings)
    running = (running_mean, running_var)
    return _run_with_statistics(detach, function, input, (weight, bias), running, use_input_stats)


def batch_norm(
    detach: Detach,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> RuleResult:
    """Compute `torch.batch_norm`. A check refuses statistics that depend on observed examples."""
    settings: dict[str, Any] = {"momentum": momentum, "eps": eps, "cudnn_enabled": cudnn_enabled}
    function = partial(torch.batch_norm, training=training, **settings)
    running = (running_mean, running_var)
    return _run_with_statistics(detach, function, input, (weight, bias), running, training)


def _run_with_statistics(
    detach: Detach,
    function: Callable[..., Tensor],
    input: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    updates_running: bool,
) -> RuleResult:
    """Run a norm with running statistics, which the backward pass must not update again."""
    output = function(input, *(_detach(detach, p) for p in parameters), *running)
    statistics = (None, None) if updates_running else running

    def normalize(x: Tensor) -> Tensor:
        return function(x, None, None, *statistics)

    return _make_channel_uses(output, input, *parameters, normalize)


def prelu(detach: Detach, input: Tensor, weight: Tensor) -> RuleResult:
    """Compute `torch.prelu`, with one slope for all or one per channel."""
    output = torch.prelu(input, detach(weight))

    def clamp(x: Tensor) -> Tensor:
        return x.clamp(max=0)

    if weight.numel() == 1:
        return _make_uses(output, input, weight, None, clamp, ndim=0, num_repeated=0)
    return _make_channel_uses(output, input, weight, None, clamp)


def _detach(detach: Detach, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else detach(parameter)


def _make_channel_uses(
    output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: Normalize
) -> RuleResult:
    """Return the uses of parameters with one number per channel of images [B, C, ...]."""
    ndim = input.ndim - 1
    return _make_uses(output, input, weight, bias, normalize, ndim=ndim, num_repeated=ndim - 1)


def _make_uses(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Normalize,
    *,
    ndim: int,
    num_repeated: int,
) -> RuleResult:
    """Return the uses of weight and bias.

    Args:
        ndim: number of last dimensions that n works on.
        num_repeated: number of last dimensions along which parameters are repeated.
    """
    shape = input.shape[input.ndim - ndim :]

    def sum_repeated(u: Tensor, p: Tensor) -> Contraction:
        size = math.prod(shape[ndim - num_repeated :])
        return PerExample(u.reshape(len(u), -1, p.numel(), size).sum((1, 3)).view(-1, *p.shape))

    def make_weight(d: Tensor, x: Tensor) -> Contraction:
        assert weight is not None
        return sum_repeated(d * normalize(x.reshape(-1, *shape)).view_as(x), weight)

    def make_bias(d: Tensor, x: Tensor) -> Contraction:
        assert bias is not None
        return sum_repeated(d, bias)

    uses = [(p, make) for p, make in ((weight, make_weight), (bias, make_bias)) if p is not None]
    return RuleResult(output, output.ndim - ndim, (input,), uses)
