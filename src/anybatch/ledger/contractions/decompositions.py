"""Operations that the ledger runs as others, because it has rules for those.

    bilinear        y_o = x W_o z + b_o, as an einsum
    attention       softmax(q k^T / sqrt(d) + bias) v, if one of these is a parameter
    embedding_bag   sum, mean or maximum of the rows of each bag, all bags padded to one length
    masked_fill     where(mask, value, x)

Recurrent layers run step by step (`recurrent_layers`). Some functions of torch are written in
Python, and first ask whether a mode wants the whole call (`has_torch_function`). Without that
question their body runs under a mode like the code of a model.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch._torch import safe_softmax
from anybatch.ledger.contractions.recurrent_layers import RECURRENT

__all__ = ["BACKWARD_CALLS", "DECOMPOSITIONS", "is_composite", "strip_mode_check"]

BACKWARD_CALLS = (torch.Tensor.backward, torch.autograd.backward)
"""Functions that begin a backward pass."""
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def is_composite(func: Any) -> bool:
    """Return whether a function of torch is written in Python and asks for modes."""
    if not isinstance(func, types.FunctionType):
        return False
    return not {*_CHECKS}.isdisjoint(func.__code__.co_names)


@cache
def strip_mode_check(func: Any) -> Callable[..., Any]:
    """Return a composite function that does not ask for modes."""
    variables = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    bare = types.FunctionType(
        func.__code__, variables, func.__name__, func.__defaults__, func.__closure__
    )
    bare.__kwdefaults__ = func.__kwdefaults__
    return bare


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return output if bias is None else output + bias


def _masked_fill(input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, input)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.dropout(safe_softmax(scores, -1), dropout_p, dropout_p > 0) @ value


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    mask = torch.ones_like(input, dtype=torch.bool)
    if offsets is not None:
        places, mask = _pad_bags(offsets, len(input), include_last_offset)
        input = input[places]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[places]
    if padding_idx is not None:
        mask = mask & (input != padding_idx % len(weight))
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if mode == "max":
        largest = rows.masked_fill(~mask[:, :, None], -torch.inf).max(1).values
        return largest.masked_fill(~mask.any(1, keepdim=True), 0)
    share = mask.to(rows.dtype)
    if per_sample_weights is not None:
        share = share * per_sample_weights
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    return (rows * share[:, :, None]).sum(1)


def _pad_bags(offsets: Tensor, length: int, has_last: bool) -> tuple[Tensor, Tensor]:
    """Compute the place in the input of each element of the padded bags [B, T], and a mask."""
    ends = offsets[1:] if has_last else torch.cat([offsets[1:], offsets.new_tensor([length])])
    starts = offsets[:-1] if has_last else offsets
    sizes = ends - starts
    steps = torch.arange(max(1, int(sizes.max())), device=offsets.device)
    return (starts[:, None] + steps).clamp(max=length - 1), steps < sizes[:, None]


DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **RECURRENT,
    torch.bilinear: _bilinear,
    F.embedding_bag: _embedding_bag,
    F.scaled_dot_product_attention: _attention,
    torch.masked_fill: _masked_fill,
    torch.Tensor.masked_fill: _masked_fill,
}
"""Replacement of each operation."""
