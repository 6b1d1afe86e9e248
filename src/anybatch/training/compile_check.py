"""Compare a compiled update with a plain one.

    |G_p - H_p|  <=  tolerance * max(|G_p|, |G| / 1000)  +  100 * |G - G'|    for each parameter p

H is the compiled gradient, G the plain one, and G' the plain one in two micro-batches: |G - G'| is
rounding. The optimiser's plain step from H must lead to the weights of the compiled step. Their
distance is compared with the length of the step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.gradient import Gradient

__all__ = ["Snapshot", "find_difference", "find_step_difference"]

_FLOOR = 1e-3  # of the norm over all parameters: a smaller one is compared with this
_ROUNDINGS = 100  # factor of the rounding of another order of summation

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Copies of tensors, by name."""

    tensors: Tensors
    copies: Tensors

    @classmethod
    def take(cls, tensors: Tensors) -> "Snapshot":
        """Copy tensors."""
        return cls(tensors, {name: tensor.detach().clone() for name, tensor in tensors.items()})

    def restore(self) -> None:
        """Give the tensors their values back."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(self.copies[name])


def find_difference(
    compiled: Gradient, plain: Gradient, gradients: Sequence[Tensors]
) -> str | None:
    """Find the first difference of two gradients that is no rounding; None: there is none.

    Args:
        gradients: by name of the parameter: compiled, plain, and plain in two micro-batches.
    """
    for name, term in plain.terms.items():
        for kind, a, b in (
            ("losses", term.values, compiled.terms[name].values),
            ("coefficients", plain.term_coefficients[name], compiled.term_coefficients[name]),
        ):
            tolerance = _get_tolerance(a)
            if not torch.allclose(a, b, tolerance, tolerance * float(a.abs().mean())):
                return f"the {kind} of the term {name!r}"
    for part, value in plain.parts.items():
        sizes = [float((c * plain.terms[n].values).abs().sum())
                 for n, c in plain.term_coefficients.items() if n == part]
        scale = sum(sizes) or abs(float(value))
        if not abs(float(value - compiled.parts[part])) <= _get_tolerance(value) * scale:
            return f"the part {part!r} of the loss"
    h, g, cut = gradients
    total = _norm(g.values())
    rounding = _ROUNDINGS * _norm(g[name] - cut[name] for name in g)
    for name in g:
        bound = _get_tolerance(g[name]) * max(_norm([g[name]]), _FLOOR * total) + rounding
        if not (distance := _norm([g[name] - h[name]])) <= bound:  # nan too
            return f"the gradient of {name}, by {distance:.1e} where rounding allows {bound:.1e},"
    return None


def find_step_difference(before: Tensors, compiled: Tensors, plain: Tensors) -> str | None:
    """Find a tensor that the optimiser's step leaves elsewhere, by more than rounding."""
    for name, end in plain.items():
        step, eps = _norm([end.double() - before[name].double()]), torch.finfo(end.dtype).eps
        bound = _get_tolerance(end) * step + 8 * eps * _norm([end])
        if not (distance := _norm([end - compiled[name]])) <= bound:
            return f"the optimiser's step of {name}, by {distance:.1e} of {step:.1e},"
    return None


def _get_tolerance(tensor: Tensor) -> float:
    return 1e-10 if tensor.dtype == torch.float64 else 1e-4


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors))
