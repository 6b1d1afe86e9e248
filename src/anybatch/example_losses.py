"""Losses of single examples, as a model yields them.

v_i value, n_i count,    m_i = v_i / n_i
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ExampleLosses",
    "Losses",
    "Outputs",
    "concatenate_losses",
    "concatenate_outputs",
    "list_outputs",
    "sum_metrics",
]


@dataclass(frozen=True, slots=True)
class ExampleLosses:
    """Losses of B examples.

    Args:
        values: [B], the loss of each example summed over its own terms (tokens, pixels);
            or [B, k], k numbers per example for a reduction that couples examples.
        counts: [B], how many terms (or how much weight) each value sums over; None: 1 each.
        groups: [B], integer group of each example, for `GroupDRO`.
        metrics: name to [B] of further figures, summed over the example's terms like the
            values; reported as their sum over the sum of counts. They do not affect the update.
        outputs: name to a tensor [B, ...] that the forward pass has made: a hidden state, logits,
            features. `gradient.outputs` returns them in the batch's order, without a graph.

    Example:
        >>> losses = ExampleLosses(torch.tensor([6.0, 1.0]), counts=torch.tensor([3, 1]))
        >>> losses.means
        tensor([2., 1.])
    """

    values: Tensor
    counts: Tensor | None = None
    groups: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Tensor:
        """Counts as a tensor [B]; ones if there are no counts."""
        if self.counts is None:
            return self.values.new_ones(self.values.shape[:1])
        return self.counts

    @property
    def present(self) -> Tensor:
        """Mask [B], True for the examples with n_i > 0. Only these take part."""
        return self.weights > 0

    @property
    def means(self) -> Tensor:
        """Mean losses m_i = v_i / n_i, shaped like the values; 0 where n_i = 0."""
        n = self.weights.to(self.values.dtype)
        n = n if self.values.ndim == 1 else n[:, None]
        return torch.where(n > 0, self.values / n, 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> "ExampleLosses":
        """Apply a function to every tensor, such as `torch.detach`. Outputs are left out."""
        return ExampleLosses(
            change(self.values),
            None if self.counts is None else change(self.counts),
            None if self.groups is None else change(self.groups),
            {name: change(metric) for name, metric in self.metrics.items()} if self.metrics else {},
        )


Losses = dict[str, ExampleLosses]
"""Example losses of each term of an objective, by name."""

Outputs = dict[str, Any]
"""Outputs of a forward pass by name: tensors [B, ...], or lists of B tensors of several shapes."""


def concatenate_losses(pieces: list[Losses]) -> Losses:
    """Concatenate the losses of consecutive examples, term by term."""
    return {name: _concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def sum_metrics(losses: Losses) -> dict[str, Tensor]:
    """Compute each metric of a batch, 0-d, by name: its sum over the sum of counts.

    If there are several terms, the name of the term precedes that of the metric.
    """
    averages = {}
    for name, term in losses.items():
        for metric, values in term.metrics.items():
            key = metric if len(losses) == 1 else f"{name}.{metric}"
            averages[key] = _average(values, term)
    return averages


def list_outputs(losses: Losses) -> Outputs:
    """Return the outputs of all terms, by name as in `sum_metrics`, without a graph."""
    outputs = {}
    for name, term in losses.items():
        for output, tensor in term.outputs.items():
            outputs[output if len(losses) == 1 else f"{name}.{output}"] = tensor.detach()
    return outputs


def concatenate_outputs(pieces: Sequence[Outputs]) -> Outputs:
    """Concatenate the outputs of consecutive examples.

    Outputs whose shapes differ from piece to piece, as padded sequences do, become a list of one
    tensor for each example.
    """
    outputs: Outputs = {}
    for name in pieces[0] if pieces else ():
        tensors = [piece[name] for piece in pieces]
        has_one_shape = not any(isinstance(tensor, list) for tensor in tensors)
        if has_one_shape and len({tensor.shape[1:] for tensor in tensors}) == 1:
            outputs[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        else:
            outputs[name] = [row for tensor in tensors for row in tensor]
    return outputs


def _average(metric: Tensor, term: ExampleLosses) -> Tensor:
    if term.counts is None:  # the general formula takes two more operations
        return metric.sum() / len(metric)
    return torch.where(term.present, metric, 0).sum() / term.weights.sum()


def _concatenate(pieces: list[ExampleLosses]) -> ExampleLosses:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    has_counts = any(piece.counts is not None for piece in pieces)
    groups = [piece.groups for piece in pieces if piece.groups is not None]
    return ExampleLosses(
        torch.cat([piece.values for piece in pieces]),
        torch.cat([piece.weights for piece in pieces]) if has_counts else None,
        None if first.groups is None else torch.cat(groups),
        {name: torch.cat([piece.metrics[name] for piece in pieces]) for name in first.metrics},
    )
