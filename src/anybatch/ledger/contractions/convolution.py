"""Convolutions of one to three dimensions, and transposed ones.

    y_i = W * x_i + b,      g_i = correlation of x_i with d_i  (of W),    sum of d_i  (of b)

Each g_i is torch's own weight gradient of one example, or the product of d_i with the unfolded x_i
if that is smaller. If images are small and channels many, inner products of pixels are cheaper:

    |g|^2 = sum_st <patch_s, patch_t> <d_s, d_t>,    <patch_s, patch_t> = sum_o <x_(s+o), x_(t+o)>

s and t are places of the output, o the places of the kernel. <g_i, D> is that of d_i with D * x_i.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from anybatch.kernels.choice import allocate, run_fastest
from anybatch.ledger.contractions.base import (
    Broadcast,
    Contraction,
    Detach,
    PerExample,
    RuleResult,
    dot_rows,
    square_norms,
)

__all__ = ["Correlation", "convolve", "convolve_transposed", "square_by_pixels"]

_GRADIENT_ELEMENTS = 2**22  # of gradients in memory at once: 16 MiB
_PAIR_ELEMENTS = 2**20  # of inner products in memory at once
_CLEARLY_LESS = 0.25  # share of the multiplications at which another way is likely to be faster


def convolve(
    detach: Detach,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> RuleResult | None:
    """Compute `torch.conv1d`, `conv2d`, `conv3d`; padding is numbers, "valid" or "same"."""
    n = weight.ndim - 2
    if input.ndim != n + 2 or weight.is_complex():  # torch computes complex ones from real ones
        return None
    stride, dilation = _expand(stride, n), _expand(dilation, n)
    if padding == "same":
        input, padding = _pad_same(input, weight.shape[2:], dilation)
    padding = (0,) * n if padding == "valid" else _expand(padding, n)
    settings = _Settings(tuple(weight.shape), stride, padding, dilation, False, (0,) * n, groups)
    return _make_uses(detach, input, weight, bias, settings)


def convolve_transposed(
    detach: Detach,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> RuleResult | None:
    """Compute `torch.conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`."""
    n = weight.ndim - 2
    if input.ndim != n + 2 or weight.is_complex():  # torch computes complex ones from real ones
        return None
    numbers = (_expand(x, n) for x in (stride, padding, dilation, output_padding))
    stride, padding, dilation, output_padding = numbers
    settings = _Settings(
        tuple(weight.shape), stride, padding, dilation, True, output_padding, groups
    )
    return _make_uses(detach, input, weight, bias, settings)


@final
@dataclass(frozen=True, slots=True)
class _Settings:
    """Settings of a convolution."""

    shape: tuple[int, ...]  # of the weight
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the convolution by a function that autocast knows; `torch.convolution` is none."""
        k = len(self.stride) - 1
        if self.is_transposed:
            transposed = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
            others = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            return transposed[k](x, weight, bias, *others)
        plain = (torch.conv1d, torch.conv2d, torch.conv3d)
        return plain[k](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def weight_gradient(self, x: Tensor, d: Tensor, num: int = 1) -> Tensor:
        """Compute the weight gradients of `num` convolutions side by side, [num K, ...].

        Args:
            x: [N, num C, ...], the inputs.
            d: [N, num K, ...], the gradients of the outputs.
            num: number of convolutions, which run as groups of one.
        """
        shape = (num * self.shape[0], *self.shape[1:])
        gradient: Tensor = torch.ops.aten.convolution_backward(
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
        return gradient


def _make_uses(
    detach: Detach, input: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings
) -> RuleResult:
    output = settings.convolve(input, detach(weight), None if bias is None else detach(bias))
    ndim = len(settings.stride) + 1  # of one image

    def make_correlation(d: Tensor, x: Tensor) -> Contraction:
        return Correlation(_flatten_images(x, ndim), _flatten_images(d, ndim), settings)

    def make_broadcast(d: Tensor, x: Tensor) -> Contraction:
        sums = _flatten_images(d, ndim).sum(tuple(range(3, 2 + ndim)))
        return Broadcast(sums, (d.shape[-ndim],))

    uses = [(weight, make_correlation)]
    if bias is not None:
        uses.append((bias, make_broadcast))
    return RuleResult(output, 1, (input,), uses)


def _flatten_images(tensor: Tensor, ndim: int) -> Tensor:
    """Reshape [B, ..., C, ...] to [B, T, C, ...], where an image [C, ...] has `ndim` dimensions."""
    return tensor.reshape(len(tensor), -1, *tensor.shape[-ndim:])


def _expand(value: Any, n: int) -> tuple[int, ...]:
    """Expand a number, or a tuple of one number, to n numbers."""
    return (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))


def _pad_same(
    input: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input and the padding that keep the size. An odd padding is applied to the input,
    with its last zero at the end."""
    missing = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(m % 2 for m in missing):
        sides = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        return F.pad(input, sides), (0,) * len(missing)
    return input, tuple(m // 2 for m in missing)


@final
@dataclass(frozen=True, slots=True)
class Correlation(Contraction):
    """Use of a kernel by x [B, T, C, ...] that becomes y with gradients d [B, T, K, ...]."""

    x: Tensor
    d: Tensor
    settings: _Settings

    def gradients(self) -> Tensor:
        g = allocate((len(self), *self.settings.shape), self.x)
        for start, stop, few in self._iterate_images():
            g[start:stop] = few
        return g

    def sum_gradients(self, c: Tensor | None) -> Tensor:
        d = self.d
        if c is not None:
            d = d * c.to(d.dtype).view(-1, *[1] * (d.ndim - 1))
        return self.settings.weight_gradient(self.x.flatten(0, 1), d.flatten(0, 1))

    def square_norms(self) -> Tensor:
        ways = {"images": lambda: torch.cat([square_norms(g) for *_, g in self._iterate_images()])}
        if self._is_unfolded_small:
            ways["unfolded"] = lambda: square_norms(self._multiply_unfolded())
        if self._pixel_share < 1:
            ways = {"gram": self._square_by_pixels, **ways}
        return run_fastest(f"squares, stride {self.settings.stride}", self.x, self._sizes, ways)

    def sum_and_square(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.x.dtype.itemsize < 4:  # too narrow for sums
            return self.sum_gradients(c), self.square_norms()
        ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "images": lambda: self._sum_images(c)
        }
        if self._is_unfolded_small:
            ways["unfolded"] = lambda: self._sum_unfolded(c)
        if self._pixel_share < 1:
            ways["apart"] = lambda: (self.sum_gradients(c), self._square_by_pixels())
        if self._pixel_share < _CLEARLY_LESS:
            ways = dict(reversed(ways.items()))
        name = f"total and squares, stride {self.settings.stride}"
        return run_fastest(name, self.x, self._sizes, ways)

    def dot(self, direction: Tensor) -> Tensor:
        outputs = self.settings.convolve(self.x.flatten(0, 1), direction)
        return dot_rows(outputs.view_as(self.d), self.d)

    def compact(self) -> Contraction:
        if self.x[0].numel() + self.d[0].numel() < prod(self.settings.shape):
            return self
        return PerExample(self.gradients())

    def _iterate_images(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, g [b, ...]), some examples at a time."""
        num = max(1, min(_GRADIENT_ELEMENTS // prod(self.settings.shape), 256))
        x, d = self.x.contiguous(), self.d.contiguous()
        for start in range(0, len(x), num):
            images, rows = x[start : start + num], d[start : start + num]
            b = len(images)
            # One convolution computes the gradients of b examples as groups.
            x_b, d_b = (t.transpose(0, 1).flatten(1, 2) for t in (images, rows))
            g = self.settings.weight_gradient(x_b, d_b, b)
            yield start, start + b, g.view(b, *self.settings.shape)

    def _sum_images(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute sum_i c_i g_i and |g_i|^2, some examples at a time."""
        total, squares = self.x.new_zeros(self.settings.shape), []
        c = self.x.new_ones(len(self)) if c is None else c.to(total.dtype)
        for start, stop, g in self._iterate_images():
            squares.append(square_norms(g))
            total.view(-1).addmv_(g.flatten(1).T, c[start:stop])
        return total, torch.cat(squares)

    def _sum_unfolded(self, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute sum_i c_i g_i and |g_i|^2 from unfolded images."""
        g = self._multiply_unfolded()
        c = g.new_ones(len(g)) if c is None else c.to(g.dtype)
        return torch.mv(g.flatten(1).T, c).view(self.settings.shape), square_norms(g)

    def _multiply_unfolded(self) -> Tensor:
        """Compute g_i = d_i U_i^T [B, K, C k], where U_i holds the C k inputs of each output."""
        s = self.settings
        u = F.unfold(self.x.flatten(0, 1), s.shape[2:], s.dilation, s.padding, s.stride)
        return torch.bmm(self.d.flatten(0, 1).flatten(2), u.transpose(1, 2))

    @property
    def _is_unfolded_small(self) -> bool:
        """True if the unfolded image is no larger than the output of the layer."""
        s, (out, *rest) = self.settings, self.settings.shape
        is_plain = len(s.stride) == 2 and s.groups == 1 and not s.is_transposed
        return is_plain and self.x.shape[1] == 1 and prod(rest) <= out

    def _square_by_pixels(self) -> Tensor:
        s, (image, rows) = self.settings, self._sides
        return square_by_pixels(
            image[:, 0], rows[:, 0], s.shape[2:], s.stride, s.padding, s.dilation, s.groups
        )

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """Tensor that the kernel moves over, and the tensor with one value for each move."""
        return (self.d, self.x) if self.settings.is_transposed else (self.x, self.d)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Sizes whose product is the number of multiplications for all g_i."""
        return (*self.x.shape[:2], *self.settings.shape, *self._sides[1].shape[3:])

    @property
    def _pixel_share(self) -> float:
        """Multiplications by pixels over those for all g_i; infinite if pixels are no way."""
        image, rows = self._sides
        if image.shape[1] != 1 or image.dtype.itemsize < 4:  # narrow types cancel
            return inf
        sizes = (n + 2 * p for n, p in zip(image.shape[3:], self.settings.padding, strict=True))
        pairs = prod(sizes) ** 2 * image.shape[2]
        pairs += prod(rows.shape[3:]) ** 2 * rows.shape[2]
        return pairs * len(self) / max(1, prod(self._sizes))


def square_by_pixels(
    image: Tensor,
    rows: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute |g_i|^2 [B] from inner products of pixels, without patches.

    The sum over the places of the kernel goes one dimension after the other.

    Args:
        image: [B, C, ...], the tensor that the kernel moves over.
        rows: [B, K, ...], the gradient of the output.
    """
    n = len(kernel)
    outputs = rows.shape[2:]
    image = F.pad(image, [side for p in reversed(padding) for side in (p, p)])
    num = max(1, _PAIR_ELEMENTS // (groups * prod(image.shape[2:]) ** 2))
    squares = []
    for start in range(0, len(image), num):
        x, d = image[start : start + num], rows[start : start + num]
        pairs = _multiply_pixels(x, groups)
        for k in range(n):
            reach = stride[k] * (outputs[k] - 1) + 1
            places = range(0, kernel[k] * dilation[k], dilation[k])
            cuts = [slice(o, o + reach, stride[k]) for o in places]
            pairs = torch.stack([_cut(pairs, k, n, cut) for cut in cuts]).sum(0)
        squares.append(dot_rows(pairs, _multiply_pixels(d, groups)))
    return torch.cat(squares).view(-1, groups).sum(1).clamp(min=0)


def _multiply_pixels(images: Tensor, groups: int) -> Tensor:
    """Compute the inner products of every two pixels: [B, C, ...] to [B groups, ..., ...]."""
    pixels = images.shape[2:]
    flat = images.reshape(len(images) * groups, -1, prod(pixels))
    return (flat.transpose(1, 2) @ flat).view(len(flat), *pixels, *pixels)


def _cut(pairs: Tensor, k: int, n: int, cut: slice) -> Tensor:
    """Cut dimension k of both pixels of each pair."""
    index = [slice(None)] * (1 + 2 * n)
    index[1 + k] = index[1 + n + k] = cut
    return pairs[tuple(index)]
