"""What each grain adds to the gradient: all that is defined where examples couple.

    G = sum over grains g of G_g,    G_g = sum of c_i grad v_i over the examples of g

A grain goes back alone, so that G_g is what that leaves in `.grad`.
"""

import math

import torch
from torch import Tensor

from anybatch._torch import norms_of
from anybatch.errors import LedgerError
from anybatch.gradient.survey import Survey

__all__ = ["GrainNorms"]


class GrainNorms:
    """|G_g| of the grains of a share, in their order."""

    def __init__(self, survey: Survey) -> None:
        self._parameters = list(survey.parameters.values())
        self._norms: list[float] = []

    def note(self, scale: float) -> None:
        """Note what the backward pass of one grain has left in `.grad`, times a factor."""
        own = [p.grad for p in self._parameters if p.grad is not None]
        own = [g if g.dtype.itemsize >= 4 else g.float() for g in own]
        self._norms.append(abs(scale) * math.hypot(*map(float, norms_of(own))))

    def norms(self, why: str | None, factor: float) -> Tensor:
        """|G_g| [grains].

        Args:
            why: the model goes grain by grain; None: it does not.
            factor: what the gradients of parts are multiples of G_g by.

        Raises:
            LedgerError: a model without grains.
        """
        if why is None:
            raise LedgerError(
                "the model neither couples examples nor draws random numbers, so that it is not "
                "cut into grains, expected one that is. Observe norms, which are each example's."
            )
        return factor * torch.tensor(self._norms, dtype=torch.float64)
