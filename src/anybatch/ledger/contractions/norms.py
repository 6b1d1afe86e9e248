"""What normalises or bends, then scales and shifts: layer, group, instance, batch, RMS norm, PReLU.

    y_i = w * n(x_i) + b,      g_i = sum of d_i * n(x_i)  (of w),    sum of d_i  (of b)

n has no parameters, and is computed again from x in the backward pass. That of batch normalisation
in training takes all examples together: they belong to themselves alone only if x has no gradient.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Const, Contraction, Met
from anybatch.ledger.contractions.elementwise import Ready

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "prelu", "rms_norm"]

Bare = Callable[[Tensor], Tensor]


def layer_norm(
    const: Const,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Met:
    """`torch.layer_norm`."""
    shape = list(normalized_shape)
    output = torch.layer_norm(input, shape, _const(const, weight), _const(const, bias), eps)

    def bare(x: Tensor) -> Tensor:
        return torch.layer_norm(x, shape, None, None, eps)

    return _met(output, input, weight, bias, bare, item=len(shape), behind=0)


def rms_norm(
    const: Const,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Met:
    """`torch.rms_norm`."""
    shape = list(normalized_shape)
    output = torch.rms_norm(input, shape, _const(const, weight), eps)

    def bare(x: Tensor) -> Tensor:
        return torch.rms_norm(x, shape, None, eps)

    return _met(output, input, weight, None, bare, item=len(shape), behind=0)


def group_norm(
    const: Const,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Met:
    """`torch.group_norm`."""
    output = torch.group_norm(input, num_groups, _const(const, weight), _const(const, bias), eps)

    def bare(x: Tensor) -> Tensor:
        return torch.group_norm(x, num_groups, None, None, eps)

    return _channels(output, input, weight, bias, bare)


def instance_norm(
    const: Const,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Met:
    """`torch.instance_norm`."""
    normalised = partial(
        torch.instance_norm,
        use_input_stats=use_input_stats,
        momentum=momentum,
        eps=eps,
        cudnn_enabled=cudnn_enabled,
    )
    running = (running_mean, running_var)
    output = normalised(input, _const(const, weight), _const(const, bias), *running)
    own = (None, None) if use_input_stats else running  # which must not move a second time

    def bare(x: Tensor) -> Tensor:
        return normalised(x, None, None, *own)

    return _channels(output, input, weight, bias, bare)


def batch_norm(
    const: Const,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Met:
    """`torch.batch_norm`; statistics of the batch are constants, or examples are found coupled."""
    normalised = partial(
        torch.batch_norm,
        training=training,
        momentum=momentum,
        eps=eps,
        cudnn_enabled=cudnn_enabled,
    )
    running = (running_mean, running_var)
    output = normalised(input, _const(const, weight), _const(const, bias), *running)
    own = (None, None) if training else running  # which must not move a second time

    def bare(x: Tensor) -> Tensor:
        return normalised(x, None, None, *own)

    return _channels(output, input, weight, bias, bare)


def prelu(const: Const, input: Tensor, weight: Tensor) -> Met:
    """`torch.prelu`, one slope for all or one for each channel."""
    output = torch.prelu(input, const(weight))

    def bare(x: Tensor) -> Tensor:
        return x.clamp(max=0)

    if weight.numel() == 1:
        return _met(output, input, weight, None, bare, item=0, behind=0)
    return _channels(output, input, weight, None, bare)


def _const(const: Const, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else const(parameter)


def _channels(
    output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, bare: Bare
) -> Met:
    """Of images [B, C, ...], with a parameter for each channel."""
    return _met(output, input, weight, bias, bare, item=input.ndim - 1, behind=input.ndim - 2)


def _met(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bare: Bare,
    *,
    item: int,
    behind: int,
) -> Met:
    """The last `item` dimensions are what n works on; parameters lack the last `behind`."""
    shape = input.shape[input.ndim - item :]

    def summed(u: Tensor, p: Tensor) -> Contraction:
        repeated = math.prod(shape[item - behind :])
        return Ready(u.reshape(len(u), -1, p.numel(), repeated).sum((1, 3)).view(-1, *p.shape))

    uses = []
    if weight is not None:
        uses.append(
            (weight, lambda d, x: summed(d * bare(x.reshape(-1, *shape)).view_as(x), weight))
        )
    if bias is not None:
        uses.append((bias, lambda d, x: summed(d, bias)))
    return Met(output, output.ndim - item, (input,), uses)
