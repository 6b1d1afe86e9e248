"""Losses that left the numbers, by example.

A loss that is not finite and has c_i = 0 leaves R finite, but not the gradient: in
c_i * grad v_i the derivative is as little a number as v_i, and 0 * nan is nan.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch.errors import DivergenceError, LossError
from anybatch.example_losses import ExampleLosses
from anybatch.reductions import Reduced

__all__ = ["check_finite"]


def check_finite(
    name: str, losses: ExampleLosses, reduced: Reduced, ids: Sequence[Tensor | None]
) -> None:
    """Refuse a term of the loss from which no gradient can come.

    Args:
        name: of the term.
        losses: of the whole batch.
        reduced: what the reduction made of them.
        ids: of the examples, by rank; None where they were not given.

    Raises:
        DivergenceError: R is not finite.
        LossError: a loss is not finite, and its coefficient is 0.
    """
    if not math.isfinite(reduced.value.item()):
        bad = ~_each(torch.isfinite(losses.values))
        raise DivergenceError(
            f"the term {name!r} of the loss is {reduced.value.item()}, expected a finite number. "
            + (
                f"Not finite for {_named(bad, ids)}. "
                if bad.any()
                else "Each example's loss is finite: the reduction overflows. "
            )
            + "Look at these examples for NaN, or lower the learning rate."
        )
    if math.isfinite(losses.values.sum().item()):
        return
    finite = torch.isfinite(losses.values)
    idle = ~_each(finite) & _each(reduced.coefficients == 0)
    if idle.any():
        raise LossError(
            f"the term {name!r} of the loss is not finite for {_named(idle, ids)}. Their "
            f"coefficient is 0, as with a count of 0, but 0 * nan is nan: they would spoil the "
            f"gradient. Keep the loss finite where nothing counts: divide by "
            f"count.clamp(min=1), or replace inputs by torch.where before log or sqrt, not after."
        )


def _each(flags: Tensor) -> Tensor:
    """[B], whether all flags of an example are set."""
    return flags if flags.ndim == 1 else flags.all(1)


def _named(which: Tensor, ids: Sequence[Tensor | None]) -> str:
    """The examples that are meant, by id where all are known."""
    places = which.nonzero()[:, 0].cpu()
    known = [given.cpu() for given in ids if given is not None]
    is_known = len(known) == len(ids)
    shown = torch.cat(known)[places] if is_known else places
    listed = ", ".join(str(int(i)) for i in shown[:8]) + (", ..." if len(shown) > 8 else "")
    kind = "id" if is_known else "place in the batch"
    return f"{len(places)} of {len(which)} examples, by {kind}: {listed}"
