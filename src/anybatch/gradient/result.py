"""Result of one update: from the sum over all examples to the gradient.

G  <-  sum / loss scale,    G  <-  G + grad Omega,    G  <-  hooks(G),    G  <-  clip(G)
"""

import cmath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch import distributed, penalties
from anybatch._torch import multiply_in_place, unscale_in_place
from anybatch.displays import format_number, make_table
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.example_losses import (
    Losses,
    Outputs,
    concatenate_losses,
    concatenate_outputs,
    sum_metrics,
)
from anybatch.gradient.clip import ClipExamples, ClipNorm
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.update import Outcome, Update
from anybatch.layout import MicroBatch
from anybatch.ledger.ledger import Ledger
from anybatch.objective import DATA

__all__ = ["Completion", "Gradient", "complete_sum", "make_gradient"]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Gradient of one update; the gradient itself is in each parameter's `.grad`.

    Example:
        >>> import anybatch as ab
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> objective = ab.Objective(lambda model, x: model(x).square().sum(1))
        >>> gradient = ab.batch_gradient(model, objective, torch.zeros(4, 2))
        >>> gradient.loss.item(), gradient.coefficients.tolist()
        (0.0, [0.25, 0.25, 0.25, 0.25])
    """

    loss: Tensor
    """0-d, R + Omega of the whole batch, equal on every rank."""
    parts: Mapping[str, Tensor]
    """Each term and penalty by name, 0-d; their sum is the loss."""
    terms: Losses
    """Losses of this rank's share by term, without a graph."""
    term_coefficients: Mapping[str, Tensor]
    """c_i of this rank's share by term, shaped like the values."""
    metrics: Mapping[str, Tensor]
    """Each metric over the whole batch, 0-d: its sum over the sum of counts."""
    num_examples: int
    """Examples of the whole batch."""
    ids: Tensor | None
    """[B] of this share, as passed."""
    norm: Tensor | None
    """0-d, |G| before clipping; None without `clip`."""
    is_finite: bool
    """Whether every element of the data term's gradient is finite. If not, buffers are as before,
    and the optimiser must not step."""
    micro_batch: int
    """Most examples that went through the model together on this rank. Under "auto", the most that
    are known to fit, if that is more."""
    reduction_state: Mapping[str, Tensor | None]
    """State of each reduction for the next step."""
    group: ProcessGroup | None = None
    ledger: Ledger | None = None
    """Per-example quantities of this share; None without `observe` and `ClipExamples`."""
    outputs: Outputs = field(default_factory=dict)
    """`ExampleLosses.outputs` of this share by name, [B, ...] in the batch's order; a list of B
    tensors where their shapes differ. With several terms the name is "term.output"."""

    @property
    def losses(self) -> Any:
        """`ExampleLosses` [B] of this share; a dict by term where the objective names terms."""
        return _unwrap_single(self.terms)

    @property
    def coefficients(self) -> Any:
        """c_i [B] of this share; a dict by term where the objective names terms."""
        return _unwrap_single(self.term_coefficients)

    def _repr_html_(self) -> str:
        """Show loss, parts and sizes as a table in a notebook, and the ledger below."""
        rows = [("loss", format_number(self.loss.item()))]
        if len(self.parts) > 1:
            rows += [(f"part: {n}", format_number(part.item())) for n, part in self.parts.items()]
        rows += [(f"metric: {n}", format_number(m.item())) for n, m in self.metrics.items()]
        rows += [
            ("examples in the batch", f"{self.num_examples:,}"),
            ("at most together in the model", f"{self.micro_batch:,}"),
        ]
        if self.norm is not None:
            rows.append(("norm before clipping", format_number(self.norm.item())))
        if not self.is_finite:
            rows.append(("warning", "some numbers are not finite; make no update"))
        table = make_table("Gradient of one update, in .grad", ("quantity", "value"), rows)
        return table if self.ledger is None else f"{table}\n{self.ledger._repr_html_()}"

    def gather(self) -> "Gradient":
        """Concatenate the shares of all ranks, in order; call it on every rank."""

        def copy_share() -> tuple[Losses, dict[str, Tensor], Tensor | None, Outputs]:
            # Clone: a view of a tensor would travel with the whole of it.
            terms = {name: term.map(torch.clone) for name, term in self.terms.items()}
            coefficients = {name: c.clone() for name, c in self.term_coefficients.items()}
            return terms, coefficients, self.ids, {n: _clone(o) for n, o in self.outputs.items()}

        per_rank = distributed.all_gather_object(copy_share, self.group)
        shares = [share for share in per_rank if len(next(iter(share[1].values())))]
        ids = [share_ids for _, _, share_ids, _ in shares if share_ids is not None]
        return replace(
            self,
            terms=concatenate_losses([terms for terms, *_ in shares]),
            term_coefficients={
                name: torch.cat([c[name] for _, c, *_ in shares]) for name in self.term_coefficients
            },
            ids=torch.cat(ids) if len(ids) == len(shares) else None,
            outputs=concatenate_outputs([outputs for *_, outputs in shares]),
            group=None,
        )


class Completion(NamedTuple):
    """Results that a rank computes from the sums; equal on all ranks, except for the ledger."""

    parts: dict[str, Tensor]
    is_finite: bool
    ledger: Ledger | None
    norm: Tensor | None


def complete_sum(
    update: Update,
    outcome: Outcome,
    accumulator: Accumulator,
    clip: ClipNorm | ClipExamples | None,
) -> Completion:
    """Turn the sum into the gradient, in place: loss scale, penalty, hooks, clipping.

    The ledger compares examples with the gradient of the data term, so it is made in between.
    """
    sums = list(accumulator.sums.values())
    is_finite = _unscale(sums, update)
    ledger = None
    if update.observation is not None:
        ledger = update.observation.ledger(accumulator.sums, outcome.factor)
    if update.grain_norms is not None:
        factor = outcome.factor / update.loss_scale
        norms = update.grain_norms.to_tensor(update.find_grain_reason(), factor)
        ledger = replace(ledger or Ledger(), grain_norms=norms)
    parts = {name: result.value for name, result in outcome.reduced.items()}
    penalty, gradients, survey = update.objective.penalty, accumulator.sums, update.survey
    if penalty is not None:
        whole = fsdp.gather_tensor if survey.units else None
        model, weights = update.model, survey.parameters
        parts |= penalties.add_gradients(penalty, model, gradients, weights, whole=whole)
    if update.hooks is not None:
        update.hooks.apply(accumulator.sums)
        sums = list(accumulator.sums.values())
    norm = clip.apply(sums) if isinstance(clip, ClipNorm) else None
    if update.scaler is not None:
        multiply_in_place(sums, update.loss_scale)
    return Completion(parts, is_finite, ledger, norm)


def _unscale(gradients: list[Tensor], update: Update) -> bool:
    """Divide by the loss scale, in place; return whether every element is finite.

    All ranks return the same, since their sums are equal.
    """
    if update.loss_scale == 1 and update.device.type == "cpu" and _have_finite_sums(gradients):
        return True
    not_finite = torch.zeros((), dtype=torch.float32, device=update.device)
    factor = torch.full((), 1 / update.loss_scale, dtype=torch.float32, device=update.device)
    real = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    unscale_in_place(real, not_finite, factor)
    return not not_finite.item()


def _have_finite_sums(gradients: list[Tensor]) -> bool:
    """Return whether each sum is finite: then each element is. Finite elements may overflow."""
    return all(cmath.isfinite(g.sum().item()) for g in gradients)


def make_gradient(
    update: Update, outcome: Outcome, completion: Completion, micro_batches: list[MicroBatch]
) -> Gradient:
    """Make the result that the user receives."""
    start, stop, total = update.share_range[:3]
    values = [value.to(update.device) for value in completion.parts.values()]
    sizes = [micro_batch.stop - micro_batch.start for micro_batch in micro_batches]
    terms = outcome.losses
    coefficients = {name: result.coefficients for name, result in outcome.reduced.items()}
    if stop - start < total:
        coefficients = outcome.coefficients(start, stop)
        terms = {name: term.map(lambda t: t[start:stop]) for name, term in terms.items()}
    return Gradient(
        loss=values[0] if len(values) == 1 else torch.stack(values).sum(),
        parts=completion.parts,
        terms=terms,
        term_coefficients=coefficients,
        metrics=sum_metrics(outcome.losses),
        outputs=concatenate_outputs(update.outputs) if update.outputs else {},
        num_examples=total,
        ids=update.ids,
        norm=completion.norm,
        is_finite=completion.is_finite,
        micro_batch=max(sizes, default=0),
        reduction_state={name: result.state for name, result in outcome.reduced.items()},
        group=update.group,
        ledger=completion.ledger,
    )


def _clone(output: Any) -> Any:
    """Copy an output; copies of rows do not carry the whole tensor along."""
    return [row.clone() for row in output] if isinstance(output, list) else output.clone()


def _unwrap_single(terms: Mapping[str, Any]) -> Any:
    """Return the only term of an unnamed objective; a dict if the terms have names."""
    return next(iter(terms.values())) if list(terms) == [DATA] else dict(terms)
