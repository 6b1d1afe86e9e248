"""Clipping by norm: of the whole gradient, penalty included, or of each example's.

    ClipNorm        G <- G * min(1, max_norm / |G|)
    ClipExamples    G  = sum_i c_i * min(1, max_norm / |grad m_i|) * grad v_i

Without the epsilon that torch adds to |G|, which would set a scale of its own. m_i = v_i / n_i is
the example's own mean loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch._torch import multiply_in_place, norms_of
from anybatch.batch import is_number
from anybatch.distributed import fsdp
from anybatch.errors import LossError

__all__ = ["ClipExamples", "ClipNorm", "norm_of"]


@dataclass(frozen=True, slots=True)
class ClipNorm:
    """Shorten the update gradient to at most max_norm.

    Source: Pascanu et al. 2013, 1211.5063, algorithm 1.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not (is_number(self.max_norm) and self.max_norm > 0):
            raise LossError(f"ClipNorm expects a norm above 0, got {self.max_norm!r}.")

    def apply(self, gradients: Sequence[Tensor]) -> Tensor:
        """Clip in place; returns the norm before, 0-d."""
        norm = norm_of(gradients)
        multiply_in_place(list(gradients), (self.max_norm / norm).clamp(max=1.0))
        return norm


@dataclass(frozen=True, slots=True)
class ClipExamples:
    """Shorten each example's gradient to at most max_norm, before they are added up.

    Source: Abadi et al. 2016, 1607.00133, algorithm 1, without its noise.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not (is_number(self.max_norm) and self.max_norm > 0):
            raise LossError(f"ClipExamples expects a norm above 0, got {self.max_norm!r}.")

    def factors(self, norms: Tensor) -> Tensor:
        """What each example is multiplied by: [B]; 1 where its gradient is 0."""
        return torch.where(norms > 0, (self.max_norm / norms).clamp(max=1.0), 1.0)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all tensors, 0-d; of complex ones, of their moduli."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    if any(map(fsdp.is_sharded, tensors)):  # one after the other, the bits of one rank
        norms = [norms_of([fsdp.gather_tensor(tensor)])[0] for tensor in tensors]
    else:
        norms = list(norms_of(list(tensors)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
