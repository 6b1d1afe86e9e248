"""Clipping by norm: of the whole gradient, penalty included, or of each example's.

    ClipNorm        G <- G * min(1, max_norm / |G|)
    ClipExamples    G  = sum_i c_i * min(1, max_norm / |grad m_i|) * grad v_i

There is no epsilon: torch adds one to |G|, which sets a scale of its own. m_i = v_i / n_i is the
example's own mean loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch._torch import multiply_in_place, norms_of
from anybatch.batch import is_number
from anybatch.distributed import fsdp
from anybatch.errors import LossError

__all__ = ["ClipExamples", "ClipNorm", "compute_norm"]


@dataclass(frozen=True, slots=True)
class ClipNorm:
    """Shorten the update gradient to at most max_norm.

    Source: Pascanu et al. 2013, 1211.5063, algorithm 1.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> norm = ClipNorm(max_norm=1.0).apply([gradient])
        >>> norm, gradient
        (tensor(5.), tensor([0.6000, 0.8000]))
    """

    max_norm: float

    def __post_init__(self) -> None:
        _check_max_norm("ClipNorm", self.max_norm)

    def apply(self, gradients: Sequence[Tensor]) -> Tensor:
        """Clip in place; return the norm before clipping, 0-d."""
        norm = compute_norm(gradients)
        multiply_in_place(list(gradients), (self.max_norm / norm).clamp(max=1.0))
        return norm


@dataclass(frozen=True, slots=True)
class ClipExamples:
    """Shorten each example's gradient to at most max_norm, before they are added up.

    Source: Abadi et al. 2016, 1607.00133, algorithm 1, without its noise.

    Example:
        >>> ClipExamples(max_norm=1.0).factors(torch.tensor([0.0, 0.5, 4.0]))
        tensor([1.0000, 1.0000, 0.2500])
    """

    max_norm: float

    def __post_init__(self) -> None:
        _check_max_norm("ClipExamples", self.max_norm)

    def factors(self, norms: Tensor) -> Tensor:
        """Compute the factor of each example, [B]; 1 if its gradient is 0."""
        return torch.where(norms > 0, (self.max_norm / norms).clamp(max=1.0), 1.0)


def _check_max_norm(name: str, max_norm: object) -> None:
    if not (is_number(max_norm) and max_norm > 0):  # type: ignore[operator]
        raise LossError(f"{name} has max_norm={max_norm!r}. It must be a number above 0.")


def compute_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm over all elements of all tensors, 0-d; moduli if complex."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    if any(map(fsdp.is_sharded, tensors)):  # one after the other, for the bits of one rank
        norms = [norms_of([fsdp.gather_tensor(tensor)])[0] for tensor in tensors]
    else:
        norms = list(norms_of(list(tensors)))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
