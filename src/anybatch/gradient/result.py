"""What one update is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.example_losses import ExampleLosses, Losses
from anybatch.ledger.ledger import Ledger
from anybatch.objective import DATA

__all__ = ["Gradient", "joined", "mean_metrics"]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of one update; the gradient itself is in each parameter's `.grad`."""

    loss: Tensor
    """0-d, R + Omega of the whole batch, equal on every rank."""
    parts: Mapping[str, Tensor]
    """Each term and penalty by name, 0-d; they add up to the loss."""
    terms: Losses
    """Losses of this rank's share by term, without a graph."""
    term_coefficients: Mapping[str, Tensor]
    """c_i of this rank's share by term, shaped like the values."""
    metrics: Mapping[str, Tensor]
    """Each metric over the whole batch, 0-d: its sum over the sum of counts."""
    num_examples: int
    """Examples of the whole batch."""
    ids: Tensor | None
    """[B] of this share, as given."""
    norm: Tensor | None
    """0-d, |G| before clipping; None without `clip`."""
    is_finite: bool
    """Whether every element of the data term's gradient is; if not, buffers are as before, and no
    update should be made of it."""
    micro_batch: int
    """The most examples that went through the model together on this rank; under "auto" what is
    known to fit, if it is more."""
    reduction_state: Mapping[str, Tensor | None]
    """State of each reduction for the next step."""
    group: ProcessGroup | None = None
    ledger: Ledger | None = None
    """Per-example quantities of this share; None without `observe` and `ClipExamples`."""

    @property
    def losses(self) -> Any:
        """`ExampleLosses` [B] of this share; a dict by term where the objective names terms."""
        return _only(self.terms)

    @property
    def coefficients(self) -> Any:
        """c_i [B] of this share; a dict by term where the objective names terms."""
        return _only(self.term_coefficients)

    def gather(self) -> "Gradient":
        """The same with the shares of all ranks put together, in order; call it on every rank."""
        told = distributed.all_gather_object(lambda: (self._packed(), self.ids), self.group)
        held = [(pair, ids) for pair, ids in told if len(next(iter(pair[1].values())))]
        ids = [ids for _, ids in held if ids is not None]
        return replace(
            self,
            terms=joined([terms for (terms, _), _ in held]),
            term_coefficients={
                name: torch.cat([c[name] for (_, c), _ in held]) for name in self.term_coefficients
            },
            ids=torch.cat(ids) if len(ids) == len(held) else None,
            group=None,
        )

    def _packed(self) -> tuple[Losses, dict[str, Tensor]]:
        """Losses and coefficients by themselves: a view would travel with the whole batch."""
        terms = {name: term.map(torch.clone) for name, term in self.terms.items()}
        return terms, {name: c.clone() for name, c in self.term_coefficients.items()}


def joined(pieces: list[Losses]) -> Losses:
    """Losses of consecutive runs of examples put together, by term."""
    return {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}


def mean_metrics(losses: Losses) -> dict[str, Tensor]:
    """Each metric over the examples that take part: sum over sum of counts, 0-d, by name.

    The name is preceded by the term's where there are several terms.
    """
    return {
        metric if len(losses) == 1 else f"{name}.{metric}": _mean(m, term)
        for name, term in losses.items()
        for metric, m in term.metrics.items()
    }


def _mean(metric: Tensor, term: ExampleLosses) -> Tensor:
    if term.counts is None:  # the same in two operations, of some ten microseconds each
        return metric.sum() / len(metric)
    return torch.where(term.present, metric, 0).sum() / term.weights.sum()


def _joined(pieces: list[ExampleLosses]) -> ExampleLosses:
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return ExampleLosses(
        torch.cat([piece.values for piece in pieces]),
        None
        if all(piece.counts is None for piece in pieces)
        else torch.cat([piece.weights for piece in pieces]),
        None
        if first.groups is None
        else torch.cat([piece.groups for piece in pieces if piece.groups is not None]),
        {name: torch.cat([piece.metrics[name] for piece in pieces]) for name in first.metrics},
    )


def _only(terms: Mapping[str, Any]) -> Any:
    return next(iter(terms.values())) if list(terms) == [DATA] else dict(terms)
