"""Norms of the kernel gradients of a convolution, from inner products of pixels.

    |g|^2 = sum_st <patch_s, patch_t> <d_s, d_t>,    <patch_s, patch_t> = sum_o <x_(s+o), x_(t+o)>

s and t are outputs, o the places of the kernel. No patch is made: sums over o go one dimension
after the other. Short where images are small and channels many.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.ledger.contractions.base import dots

__all__ = ["patch_gram"]

_ELEMENTS = 2**20  # inner products that are held at once


def patch_gram(
    image: Tensor,
    rows: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """|g_i|^2: [B].

    Args:
        image: [B, C, ...], what the kernel moves over.
        rows: [B, K, ...], what it meets there: the gradient of the output.
        kernel, stride, padding, dilation, groups: of the convolution.
    """
    n = len(kernel)
    outputs = rows.shape[2:]
    image = F.pad(image, [side for p in reversed(padding) for side in (p, p)])
    num = max(1, _ELEMENTS // (groups * prod(image.shape[2:]) ** 2))
    found = []
    for start in range(0, len(image), num):
        x, d = image[start : start + num], rows[start : start + num]
        pairs = _inner_products(x, groups)
        for k in range(n):
            reach = stride[k] * (outputs[k] - 1) + 1
            places = range(0, kernel[k] * dilation[k], dilation[k])
            cuts = [slice(o, o + reach, stride[k]) for o in places]
            pairs = torch.stack([_cut(pairs, k, n, cut) for cut in cuts]).sum(0)
        found.append(dots(pairs, _inner_products(d, groups)))
    return torch.cat(found).view(-1, groups).sum(1).clamp(min=0)


def _inner_products(images: Tensor, groups: int) -> Tensor:
    """[B, C, ...] to [B groups, ..., ...]: of every two pixels."""
    pixels = images.shape[2:]
    flat = images.reshape(len(images) * groups, -1, prod(pixels))
    return (flat.transpose(1, 2) @ flat).view(len(flat), *pixels, *pixels)


def _cut(pairs: Tensor, k: int, n: int, cut: slice) -> Tensor:
    """One dimension of both pixels."""
    index = [slice(None)] * (1 + 2 * n)
    index[1 + k] = index[1 + n + k] = cut
    return pairs[tuple(index)]
