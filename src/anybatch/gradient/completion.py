"""From the sum over all parts to the gradient: loss scale, ledger, penalty, hooks, clipping.

G  <-  sum / loss scale,    G  <-  G + grad Omega,    G  <-  hooks(G),    G  <-  clip(G)
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from anybatch import penalties
from anybatch._torch import multiply_in_place, unscale_in_place
from anybatch.distributed import fsdp
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.clip import ClipNorm
from anybatch.gradient.passes import Outcome
from anybatch.gradient.update import Update
from anybatch.ledger.ledger import Ledger

__all__ = ["Completed", "complete"]


class Completed(NamedTuple):
    """Results that a rank computes from the sums; all ranks get the same, except for the ledger."""

    parts: dict[str, Tensor]
    is_finite: bool
    ledger: Ledger | None
    norm: Tensor | None


def complete(
    update: Update, outcome: Outcome, accumulator: Accumulator, clip: ClipNorm | None
) -> Completed:
    """Undo the loss scale, add the penalty, and clip, in place."""
    sums = list(accumulator.sums.values())
    is_finite = _unscaled(sums, update)
    ledger = _ledger(update, accumulator, outcome)
    parts = {name: r.value for name, r in outcome.reduced.items()}
    penalty = update.objective.penalty
    parts |= penalties.add_gradients(
        penalty, update.model, accumulator.sums, whole=fsdp.gather_tensor
    )
    if update.hooks is not None:
        update.hooks.apply(accumulator.sums)
        sums = list(accumulator.sums.values())
    norm = None if clip is None else clip.apply(sums)
    if update.scaler is not None:
        multiply_in_place(sums, update.loss_scale)
    return Completed(parts, is_finite, ledger, norm)


def _ledger(update: Update, accumulator: Accumulator, outcome: Outcome) -> Ledger | None:
    found = None
    if update.watch is not None:
        found = update.watch.ledger(accumulator.sums, outcome.factor)
    if update.grain_norms is not None:
        why = update.find_grain_reason()
        norms = update.grain_norms.norms(why, outcome.factor / update.loss_scale)
        found = replace(found or Ledger(), grain_norms=norms)
    return found


def _unscaled(gradients: list[Tensor], update: Update) -> bool:
    """Divide by the loss scale, in place; returns whether every element is finite, which is the
    same on every rank, since the sums are."""
    not_finite = torch.zeros((), dtype=torch.float32, device=update.device)
    factor = torch.full((), 1 / update.loss_scale, dtype=torch.float32, device=update.device)
    real = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    unscale_in_place(real, not_finite, factor)
    return not not_finite.item()
