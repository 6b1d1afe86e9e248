"""Calls of torch that are replaced by others, whose products and look-ups can be watched.

    bilinear        y_o = x W_o z + b_o, as an einsum
    attention       softmax(q k^T / sqrt(d) + bias) v, where a parameter is among these
    embedding_bag   sum, mean or maximum of the rows of a bag, the bags filled up to one length
    masked_fill     where(mask, value, x)

and recurrent layers step by step (`recurrent`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch._torch import safe_softmax
from anybatch.ledger.recurrent import RECURRENT

__all__ = ["REWRITTEN"]


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
    counted = torch.ones_like(input, dtype=torch.bool)
    if offsets is not None:
        places, counted = _bags(offsets, len(input), include_last_offset)
        input = input[places]
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights[places]
    if padding_idx is not None:
        counted = counted & (input != padding_idx % len(weight))
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if mode == "max":
        largest = rows.masked_fill(~counted[:, :, None], -torch.inf).max(1).values
        return largest.masked_fill(~counted.any(1, keepdim=True), 0)
    share = counted.to(rows.dtype)
    if per_sample_weights is not None:
        share = share * per_sample_weights
    if mode == "mean":
        share = share / share.sum(1, keepdim=True).clamp(min=1)
    return (rows * share[:, :, None]).sum(1)


def _bags(offsets: Tensor, length: int, has_last: bool) -> tuple[Tensor, Tensor]:
    """[B, T] each: places in the input, and which of them count."""
    ends = offsets[1:] if has_last else torch.cat([offsets[1:], offsets.new_tensor([length])])
    starts = offsets[:-1] if has_last else offsets
    sizes = ends - starts
    steps = torch.arange(max(1, int(sizes.max())), device=offsets.device)
    return (starts[:, None] + steps).clamp(max=length - 1), steps < sizes[:, None]


REWRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {
    **RECURRENT,
    torch.bilinear: _bilinear,
    F.embedding_bag: _embedding_bag,
    F.scaled_dot_product_attention: _attention,
    torch.masked_fill: _masked_fill,
    torch.Tensor.masked_fill: _masked_fill,
}
"""What a call is replaced by."""
