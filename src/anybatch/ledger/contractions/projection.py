"""Random projection of the gradient G [p, q] of a parameter to k numbers.

    S(G)[b] = sum of r_i c_j G_ij over all i, j with (h_i + e_j) mod k = b

p is the first dimension of the parameter and q all others; a vector has p = 1. The places h, e are
uniform in 0 .. k-1 and the signs r, c are 1 or -1. They are drawn from the name and the shape of
the parameter, so they are the same in every batch, layout, rank and run. On average over the draws

    <S(G), S(H)>  =  <G, H>,    with an error of about |G| |H| / sqrt(k)

A product of rows d_t, a_t needs no G. Its projection is a circular convolution:

    S(sum_t d_t a_t^T)  =  sum_t  R d_t * C a_t,    (R d)[b] = sum of r_i d_i over i with h_i = b

Source: Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps".
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Projection", "draw_projection"]


class Projection(NamedTuple):
    """Random projection of the gradients of one parameter."""

    size: int  # k
    row_places: Tensor  # h [p]
    row_signs: Tensor  # r [p]
    column_places: Tensor  # e [q]
    column_signs: Tensor  # c [q]

    @property
    def num_elements(self) -> int:
        """Number of elements of the parameter, p q."""
        return len(self.row_places) * len(self.column_places)

    def project_gradients(self, pieces: Iterable[Tensor]) -> Tensor:
        """Project whole gradients, some examples [b, ...] at a time: [B, k]."""
        places = (self.row_places[:, None] + self.column_places).flatten() % self.size
        signs = torch.outer(self.row_signs, self.column_signs).flatten()
        return torch.cat([_add_up(_flatten(g), places, signs, self.size) for g in pieces])

    def project_products(self, d: Tensor, a: Tensor) -> Tensor:
        """Project sum_t d_t a_t^T of d [B, T, p] and a [B, T, q]: [B, k]."""
        left = _add_up(d.flatten(0, 1), self.row_places, self.row_signs, self.size)
        right = _add_up(a.flatten(0, 1), self.column_places, self.column_signs, self.size)
        waves = torch.fft.rfft(left) * torch.fft.rfft(right)
        result: Tensor = torch.fft.irfft(waves.view(*d.shape[:2], -1).sum(1), self.size)
        return result

    def project_rows(self, j: Tensor, d: Tensor) -> Tensor:
        """Project a gradient whose rows j [B, T] get d [B, T, q]: [B, k]."""
        places = (self.row_places[j][:, :, None] + self.column_places) % self.size
        places = places + self.size * torch.arange(len(j), device=j.device)[:, None, None]
        signed = d * self.row_signs[j][:, :, None].to(d.dtype) * self.column_signs.to(d.dtype)
        result = d.new_zeros(len(j) * self.size)
        return result.index_add_(0, places.flatten(), signed.flatten()).view(len(j), -1)


@lru_cache(maxsize=4096)
def draw_projection(
    name: str, shape: tuple[int, ...], size: int, device: torch.device
) -> Projection:
    """Draw the projection of a parameter to `size` numbers from its name and shape."""
    p, q = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
    seed = sha256(f"{name} {shape} {size}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))

    def draw(number: int, high: int) -> Tensor:
        return torch.randint(high, (number,), generator=generator)

    numbers = (draw(p, size), 2 * draw(p, 2) - 1, draw(q, size), 2 * draw(q, 2) - 1)
    return Projection(size, *(column.to(device) for column in numbers))


def _flatten(g: Tensor) -> Tensor:
    """Reshape [B, ...] to [B, p q]; a complex number is two real ones."""
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(len(g), -1)


def _add_up(rows: Tensor, places: Tensor, signs: Tensor, size: int) -> Tensor:
    """Add up the numbers of each row [n, m] by their places, with signs: [n, size]."""
    return rows.new_zeros(len(rows), size).index_add_(1, places, rows * signs.to(rows.dtype))
