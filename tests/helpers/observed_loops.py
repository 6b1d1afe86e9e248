"""Gradients that each example adds to `.grad` in the user's own loop, by plain autograd.

The oracle goes back from each example's own share of the loss, one example at a time, without the
library. All is in float64; the bound of 1e-10 as the norm of the difference over the norm leaves a
factor of 1e4 over rounding, since products are added up in another order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anybatch.ledger.observe import Observed

BOUND = 1e-10


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_at_a_time(model: nn.Module, shares: Sequence[Tensor] | Tensor) -> Tensor:
    """Gradients [B, all parameters] of each example's share of the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for share in shares:
        gradients = torch.autograd.grad(
            share, parameters, retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def whole_gradient(model: nn.Module) -> Tensor:
    """Return `.grad` of all parameters as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads])


def distance(result: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    assert result.shape == truth.shape
    return float((result - truth).norm() / truth.norm())


def assert_exact(ledger: Observed, model: nn.Module, truth: Tensor) -> None:
    """Check the norms against the truth [B, all parameters], and `.grad` against its sum."""
    assert distance(ledger.norms, truth.norm(dim=1)) < BOUND
    assert distance(whole_gradient(model), truth.sum(0)) < BOUND
