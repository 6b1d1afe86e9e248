"""Convolutions of one to three dimensions, and transposed ones.

    y_i = W * x_i + b,      g_i = correlation of x_i with d_i  (of W),    sum of d_i  (of b)

Each g_i is torch's own weight gradient of one example, or the product of d_i with the unfolded x_i
where that is the smaller of the two. Where both cost more, norms come from inner products of pixels
(`patches`), and <g_i, D> is that of d_i with D * x_i.

Norms of the kernel gradients of a convolution, from inner products of pixels.

    |g|^2 = sum_st <patch_s, patch_t> <d_s, d_t>,    <patch_s, patch_t> = sum_o <x_(s+o), x_(t+o)>

s and t are outputs, o the places of the kernel. No patch is made: sums over o go one dimension
after the other. Short where images are small and channels many.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.kernels.choice import empty, fastest
from anybatch.ledger.contractions.base import Const, Contraction, Met, dots, square
from anybatch.ledger.contractions.elementwise import Broadcast, Ready

__all__ = ["Correlation", "convolution", "patch_gram", "transposed_convolution"]

_AT_ONCE = 2**22  # elements of gradients that are made together: 16 MiB
_CLEARLY = 0.25  # the share of multiplications at which a second way is the likelier one


@final
@dataclass(frozen=True, slots=True)
class _How:
    """What a convolution is besides its tensors."""

    shape: tuple[int, ...]  # of the weight
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = len(self.stride)  # by the names that autocast knows, which `torch.convolution` is not
        if self.is_transposed:
            turned = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[n - 1]
            how = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return turned(x, weight, bias, *how)
        straight = (torch.conv1d, torch.conv2d, torch.conv3d)[n - 1]
        return straight(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def weight_gradient(self, x: Tensor, d: Tensor, num: int = 1) -> Tensor:
        """Of so many convolutions side by side, as groups: [num C, ...], [num K, ...]."""
        shape = (num * self.shape[0], *self.shape[1:])
        found: Tensor = torch.ops.aten.convolution_backward(
            d,
            x,
            x.new_empty(1).expand(shape),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.is_transposed,
            self.output_padding,
            num * self.groups,
            (False, True, False),
        )[1]
        return found


@final
@dataclass(frozen=True, slots=True)
class Correlation(Contraction):
    """Use of a kernel by x [B, T, C, ...] that becomes y with gradients d [B, T, K, ...]."""

    x: Tensor
    d: Tensor
    how: _How

    def __len__(self) -> int:
        return len(self.x)

    def take(self, start: int, stop: int) -> Self:
        return replace(self, x=self.x[start:stop], d=self.d[start:stop])

    def gradients(self) -> Tensor:
        found = empty((len(self), *self.how.shape), self.x)
        for start, stop, g in self._few():
            found[start:stop] = g
        return found

    def total(self, c: Tensor | None) -> Tensor:
        d = self.d
        if c is not None:
            d = d * c.to(d.dtype).view(-1, *[1] * (d.ndim - 1))
        return self.how.weight_gradient(self.x.flatten(0, 1), d.flatten(0, 1))

    def squares(self) -> Tensor:
        ways = {"images": lambda: torch.cat([square(g) for _, _, g in self._few()])}
        if self._is_unfolded_small:
            ways["unfolded"] = lambda: square(self._unfolded())
        if self._gram_share < 1:
            ways = {"gram": self._gram, **ways}
        return fastest(f"squares, stride {self.how.stride}", self.x, self._sizes, ways)

    def total_and_squares(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both, each g_i made once where that is shorter."""
        if self.x.dtype.itemsize < 4:  # too narrow to add up in
            return self.total(c), self.squares()
        ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"images": lambda: self._images(c)}
        if self._is_unfolded_small:
            ways["unfolded"] = lambda: self._products(c)
        if self._gram_share < 1:
            ways["apart"] = lambda: (self.total(c), self._gram())
        if self._gram_share < _CLEARLY:
            ways = dict(reversed(ways.items()))
        return fastest(f"total and squares, stride {self.how.stride}", self.x, self._sizes, ways)

    def inner(self, direction: Tensor) -> Tensor:
        moved = self.how.convolve(self.x.flatten(0, 1), direction)
        return dots(moved.view_as(self.d), self.d)

    def kept(self) -> Contraction:
        """The same as it is to be kept for a second look: the g_i where they are smaller."""
        if self.x[0].numel() + self.d[0].numel() < math.prod(self.how.shape):
            return self
        return Ready(self.gradients())

    def _few(self) -> Iterator[tuple[int, int, Tensor]]:
        """The g_i, some examples at a time: (start, stop, [b, ...])."""
        num = max(1, min(_AT_ONCE // math.prod(self.how.shape), 256))
        x, d = self.x.contiguous(), self.d.contiguous()
        for start in range(0, len(x), num):
            images, rows = x[start : start + num], d[start : start + num]
            b = len(images)
            x_b, d_b = (t.transpose(0, 1).flatten(1, 2) for t in (images, rows))  # side by side
            g = self.how.weight_gradient(x_b, d_b, b)
            yield start, start + b, g.view(b, *self.how.shape)

    def _images(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The g_i added up and squared, some at a time."""
        total, squares = self.x.new_zeros(self.how.shape), []
        c = self.x.new_ones(len(self)) if c is None else c.to(total.dtype)
        for start, stop, g in self._few():
            squares.append(square(g))
            total.view(-1).addmv_(g.flatten(1).T, c[start:stop])
        return total, torch.cat(squares)

    def _products(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same from unfolded images."""
        g = self._unfolded()
        c = g.new_ones(len(g)) if c is None else c.to(g.dtype)
        return torch.mv(g.flatten(1).T, c).view(self.how.shape), square(g)

    def _unfolded(self) -> Tensor:
        """g_i = d_i U_i^T [B, K, C k], U_i the C k values that meet the kernel at each place."""
        how = self.how
        moves = how.shape[2:], how.dilation, how.padding, how.stride
        u = F.unfold(self.x.flatten(0, 1), *moves)
        return torch.bmm(self.d.flatten(0, 1).flatten(2), u.transpose(1, 2))

    @property
    def _is_unfolded_small(self) -> bool:
        """Whether the unfolded image is no larger than what the layer makes of it."""
        how, (out, *rest) = self.how, self.how.shape
        is_plain = len(how.stride) == 2 and how.groups == 1 and not how.is_transposed
        return is_plain and self.x.shape[1] == 1 and math.prod(rest) <= out

    def _gram(self) -> Tensor:
        how, (image, rows) = self.how, self._sides
        kernel = how.shape[2:]
        moves = how.stride, how.padding, how.dilation, how.groups
        return patch_gram(image[:, 0], rows[:, 0], kernel, *moves)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """What the kernel moves over, and what it meets there."""
        return (self.d, self.x) if self.how.is_transposed else (self.x, self.d)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Their product is the number of multiplications for all g_i."""
        return (*self.x.shape[:2], *self.how.shape, *self._sides[1].shape[3:])

    @property
    def _gram_share(self) -> float:
        """Multiplications of `_gram`, over those for all g_i; infinite where it is no way."""
        image, rows = self._sides
        if image.shape[1] != 1 or image.dtype.itemsize < 4:  # it cancels in narrow types
            return math.inf
        padded = (s + 2 * p for s, p in zip(image.shape[3:], self.how.padding, strict=True))
        pairs = math.prod(padded) ** 2 * image.shape[2]
        pairs += math.prod(rows.shape[3:]) ** 2 * rows.shape[2]
        return pairs * len(self) / max(1, math.prod(self._sizes))


def convolution(
    const: Const,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Met | None:
    """`torch.conv1d`, `conv2d`, `conv3d`; padding in numbers, "valid" or "same"."""
    n = weight.ndim - 2
    if input.ndim != n + 2 or weight.is_complex():  # torch makes complex ones of real ones
        return None
    stride, dilation = _each(stride, n), _each(dilation, n)
    if padding == "same":
        input, padding = _padded_same(input, weight.shape[2:], dilation)
    padding = (0,) * n if padding == "valid" else _each(padding, n)
    how = _How(tuple(weight.shape), stride, padding, dilation, False, (0,) * n, groups)
    return _met(const, input, weight, bias, how)


def transposed_convolution(
    const: Const,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Met | None:
    """`torch.conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`."""
    n = weight.ndim - 2
    if input.ndim != n + 2 or weight.is_complex():  # torch makes complex ones of real ones
        return None
    numbers = (_each(x, n) for x in (stride, padding, dilation, output_padding))
    stride, padding, dilation, output_padding = numbers
    how = _How(tuple(weight.shape), stride, padding, dilation, True, output_padding, groups)
    return _met(const, input, weight, bias, how)


def _met(const: Const, input: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Met:
    output = how.convolve(input, const(weight), None if bias is None else const(bias))
    own = len(how.stride) + 1  # dimensions of one image

    def correlation(d: Tensor, x: Tensor) -> Contraction:
        return Correlation(_images(x, own), _images(d, own), how)

    def bare(d: Tensor, x: Tensor) -> Contraction:
        return Broadcast(_images(d, own).sum(tuple(range(3, 2 + own))), (d.shape[-own],))

    uses = [(weight, correlation)]
    if bias is not None:
        uses.append((bias, bare))
    return Met(output, 1, (input,), uses)


def _images(tensor: Tensor, own: int) -> Tensor:
    """[B, ..., C, ...] to [B, T, C, ...], own being the dimensions of an image."""
    return tensor.reshape(len(tensor), -1, *tensor.shape[-own:])


def _each(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))


def _padded_same(
    input: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Padding that keeps the size; an odd one has its last zero behind, and is made before."""
    missing = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(m % 2 for m in missing):
        ends = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        return F.pad(input, ends), (0,) * len(missing)
    return input, tuple(m // 2 for m in missing)


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
