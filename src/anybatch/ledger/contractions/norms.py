"""Normalisation layers and PReLU: layer, group, instance, batch and RMS norm.

    y_i = w * n(x_i) + b,      g_i = sum of d_i * n(x_i)  (of w),    sum of d_i  (of b)

n has no parameters; the backward pass computes it again from x. Batch normalisation in training
mixes the examples of a batch. Its g_i are right only if x has no gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anybatch.ledger.contractions.base import Contraction, Detach, PerExample, Rule, RuleResult

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "prelu", "rms_norm"]

_STATISTICS = ("running_mean", "running_var")


def _make_norm(function: Callable[..., Tensor], names: str, flag: str | None = None) -> Rule:
    """Make the rule of a norm.

    Args:
        function: of torch.
        names: of its arguments.
        flag: argument that says whether the statistics come from the input. The backward pass must
            then not update the running statistics again.
    """

    def run(detach: Detach, *args: Any, **kwargs: Any) -> RuleResult:
        arguments = dict(zip(names.split(), args, strict=False)) | kwargs
        weight, bias = arguments.get("weight"), arguments.get("bias")
        parameters = {"weight": weight, "bias": bias}
        constants = {name: detach(p) for name, p in parameters.items() if p is not None}
        output = function(**arguments | constants)
        settings = {k: x for k, x in arguments.items() if k not in ("input", *parameters)}
        if flag is not None and arguments[flag]:
            settings |= dict.fromkeys(_STATISTICS)
        if flag is not None:
            settings |= dict.fromkeys(parameters)  # these functions have no defaults

        def normalize(x: Tensor) -> Tensor:
            return function(x, **settings)

        x = arguments["input"]
        if "normalized_shape" in arguments:
            ndim, num_repeated = len(arguments["normalized_shape"]), 0
        else:  # images [B, C, ...], with one number per channel
            ndim, num_repeated = x.ndim - 1, x.ndim - 2
        return _make_uses(output, x, weight, bias, normalize, ndim, num_repeated)

    return run


layer_norm = _make_norm(torch.layer_norm, "input normalized_shape weight bias eps cudnn_enable")
rms_norm = _make_norm(torch.rms_norm, "input normalized_shape weight eps")
group_norm = _make_norm(torch.group_norm, "input num_groups weight bias eps cudnn_enabled")
instance_norm = _make_norm(
    torch.instance_norm,
    "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    flag="use_input_stats",
)
batch_norm = _make_norm(
    torch.batch_norm,
    "input weight bias running_mean running_var training momentum eps cudnn_enabled",
    flag="training",
)


def prelu(detach: Detach, input: Tensor, weight: Tensor) -> RuleResult:
    """Compute `torch.prelu`, with one slope for all or one per channel."""
    output = torch.prelu(input, detach(weight))

    def clamp(x: Tensor) -> Tensor:
        return x.clamp(max=0)

    ndim, num_repeated = (0, 0) if weight.numel() == 1 else (input.ndim - 1, input.ndim - 2)
    return _make_uses(output, input, weight, None, clamp, ndim, num_repeated)


def _make_uses(
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    ndim: int,
    num_repeated: int,
) -> RuleResult:
    """Return the uses of weight and bias.

    Args:
        normalize: n.
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
