"""One update, made once while the ledger observes it, and everything known of it.

    G = sum_i a_i grad m_i          of the data term,   a_i = c_i n_i f_i
    U = clip(G + grad Omega)        what the optimiser gets
    w' = optimiser(w, U)            and the weights are put back to w

G is told from U by what is known of clip and penalty, so it is rounded as U is.

f_i = min(1, M / |grad m_i|) under `ClipExamples(M)`, else 1. Where an objective has several terms,
or values of several numbers, grad m_i stands for what the example adds, and a_i = f_i.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import penalties, pytree
from anybatch.errors import DivergenceError, LedgerError
from anybatch.gradient import ClipExamples, ClipNorm, Gradient, batch_gradient
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import find_grain_reason, survey_model
from anybatch.ledger import Ledger, Observe
from anybatch.objective import Objective
from anybatch.pytree import Shared, Uncollated, map_leaves
from anybatch.reductions import Function, Reduction, Scaled

__all__ = [
    "Evidence",
    "chosen",
    "contributions",
    "evidence_of",
    "in_pairs",
    "is_plain",
    "named",
    "norm",
    "with_whole",
]

MOST_ELEMENTS = 2**28
"""Numbers in the gradients of examples that are held at once: 1 GiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """An update and what it was made of; what is None or empty is not known."""

    gradient: Gradient
    unseen: str | None = None  # why the ledger tells nothing of the examples
    model: nn.Module | None = None  # with the weights of before the update
    objective: Objective | None = None
    batch: Any = None  # as `batch_gradient` takes it
    how: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `batch_gradient`
    optimizer: Optimizer | None = None
    lr: float | None = None  # of the first parameter group
    before: Mapping[str, Tensor] = field(default_factory=dict)  # w by parameter
    after: Mapping[str, Tensor] = field(default_factory=dict)  # w'; empty without an optimiser
    data: Mapping[str, Tensor] = field(default_factory=dict)  # G
    penalty: Mapping[str, Tensor] = field(default_factory=dict)  # grad Omega
    update: Mapping[str, Tensor] = field(default_factory=dict)  # U
    places: Tensor | None = None  # [P], of the examples whose gradients are known whole
    whole: Mapping[str, Tensor] = field(default_factory=dict)  # grad m_i of these, [P, ...]
    no_whole: str | None = None  # why there are none

    @property
    def ledger(self) -> Ledger:
        """The ledger of the update; an empty one if nothing was observed."""
        return self.gradient.ledger or Ledger()

    @property
    def clip(self) -> ClipNorm | ClipExamples | None:
        """How the update was clipped."""
        found: ClipNorm | ClipExamples | None = self.how.get("clip")
        return found


def evidence_of(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    optimizer: Optimizer | None = None,
    *,
    ids: Tensor | None = None,
    **how: Any,
) -> Evidence:
    """Make one update and look at it.

    Args:
        model: left with the weights and buffers that it has; its `.grad` and the optimiser's state
            are not.
        objective: what to minimise.
        batch: a pytree whose leaves have the examples first.
        optimizer: over the model's parameters; None: no update is made of the gradient.
        ids: [B], the examples' ids.
        how: further arguments of `batch_gradient`, such as key, clip and layout.

    Raises:
        DivergenceError: a gradient that is not finite; and all that `batch_gradient` raises.
    """
    names, buffers = survey_model(model).parameters, Buffers.of(model)
    before = {name: p.detach().clone() for name, p in names.items()}
    gradient, unseen = _observed(model, objective, batch, ids, before, how)
    buffers.restore()
    if not gradient.is_finite:
        raise DivergenceError(
            "The gradient of this batch is not finite, so it makes no update: a run skips such a "
            "batch. Look at another one."
        )
    update = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
    penalty = {name: torch.zeros_like(total) for name, total in update.items()}
    penalties.add_gradients(objective.penalty, model, penalty)
    factor = _clip_factor(gradient, how.get("clip"))
    after = {} if optimizer is None else _stepped(names, before, optimizer)
    found = Evidence(
        gradient=gradient,
        unseen=unseen,
        model=model,
        objective=objective,
        batch=batch,
        how=how,
        optimizer=optimizer,
        lr=None if optimizer is None else float(optimizer.param_groups[0]["lr"]),
        before=in_pairs(before),
        after=in_pairs(after),
        data=in_pairs({name: total / factor - penalty[name] for name, total in update.items()}),
        penalty=in_pairs(penalty),
        update=in_pairs(update),
    )
    return with_whole(found)


def _stepped(
    parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Return the weights after a step of the optimiser, and undo the step."""
    optimizer.step()
    after = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    return after


def is_plain(gradient: Gradient) -> bool:
    """Tell whether each example has exactly one loss."""
    terms = list(gradient.terms.values())
    return len(terms) == 1 and terms[0].values.ndim == 1


def contributions(evidence: Evidence) -> Tensor | None:
    """a_i [B], what each grad m_i is multiplied by in G; None where norms are not known."""
    gradient, norms = evidence.gradient, evidence.ledger.norms
    if norms is None:
        return None
    a = torch.ones_like(norms)
    if is_plain(gradient):
        (term,), (c,) = gradient.terms.values(), gradient.term_coefficients.values()
        a = c.to(norms) * term.weights.to(norms)
    clip = evidence.clip
    return a * clip.factors(norms) if isinstance(clip, ClipExamples) else a


def chosen(batch: Any, places: Tensor) -> Any:
    """Return the examples at these places of a batch, as a batch."""
    if isinstance(batch, Uncollated):
        return Uncollated([batch.examples[i] for i in places.tolist()], batch.collate)

    def rows(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, Shared):
            return leaf
        return leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf[places.numpy()]

    return map_leaves(rows, batch)


def named(reduction: Reduction) -> str:
    """Name a reduction: "Mean", "TopFraction(q=0.5)", the name of a function."""
    if isinstance(reduction, Function):
        return getattr(reduction.function, "__name__", type(reduction.function).__name__)
    if isinstance(reduction, Scaled):
        return f"{reduction.scale:g} * {named(reduction.reduction)}"
    return str(reduction).removesuffix("()")


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all elements, added up in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def in_pairs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """View complex numbers as pairs of real ones, which have the same norms and products."""
    return {
        name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        for name, t in tensors.items()
    }


def _observed(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    ids: Tensor | None,
    weights: Mapping[str, Tensor],
    how: Mapping[str, Any],
) -> tuple[Gradient, str | None]:
    """Compute the gradient with as much of the ledger as the model allows, and say why no more."""
    size = pytree.count_examples(batch)
    reductions = list(objective.reductions.values())
    is_linear = len(reductions) == 1 and reductions[0].factor(1.0, 1) is not None
    asked = Observe(
        parameter_norms=True,
        alignment=True,
        share=True,
        noise_scale=is_linear and size > 1 and not isinstance(how.get("clip"), ClipExamples),
        gradients=size * sum(w.numel() for w in weights.values()) <= MOST_ELEMENTS,
    )
    try:
        return batch_gradient(model, objective, batch, ids=ids, observe=asked, **how), None
    except LedgerError as error:
        if isinstance(how.get("clip"), ClipExamples):
            raise
        return batch_gradient(model, objective, batch, ids=ids, **how), str(error)


def with_whole(evidence: Evidence) -> Evidence:
    """Add the whole gradients of as many examples as fit in memory.

    Where they are not all the batch, those with the largest share are taken, in a pass of their
    own: their gradients do not depend on the company, unless the model draws or couples.
    """
    gradient, ledger = evidence.gradient, evidence.ledger
    if ledger.norms is None:
        return replace(evidence, no_whole=evidence.unseen or "the gradient was not observed.")
    if ledger.gradients is not None:
        every, whole = torch.arange(len(ledger.norms)), in_pairs(ledger.gradients)
        return replace(
            evidence, places=every, whole=whole, data=evidence.data or _summed(evidence, whole)
        )
    if evidence.model is None or evidence.objective is None or ledger.share is None:
        return replace(evidence, no_whole="whole example gradients were not observed.")
    num_weights = sum(w.numel() for w in evidence.before.values())
    num = MOST_ELEMENTS // num_weights
    reason = find_grain_reason(evidence.model, evidence.objective.example_losses)
    if num < 2 or reason is not None or not is_plain(gradient):
        why = (
            f"whole gradients of {num_weights:,} weights for each example do not fit in memory here"
        )
        return replace(evidence, no_whole=why + (f", and {reason}." if reason else "."))
    places = ledger.share.abs().topk(num).indices.sort().values.cpu()
    how = {key: evidence.how[key] for key in ("key", "precision") if key in evidence.how}
    again = batch_gradient(
        evidence.model,
        Objective(evidence.objective.example_losses, evidence.objective.reduction),
        chosen(evidence.batch, places),
        observe=Observe(gradients=True),
        **how,
    )
    assert again.ledger is not None
    return replace(evidence, places=places, whole=in_pairs(again.ledger.gradients or {}))


def _summed(evidence: Evidence, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute G from the gradients of all examples."""
    a = contributions(evidence)
    assert a is not None
    return {name: torch.tensordot(a.to(g), g, 1) for name, g in whole.items()}


def _clip_factor(gradient: Gradient, clip: object) -> float:
    """Return the factor by which the whole gradient was clipped."""
    if not isinstance(clip, ClipNorm) or gradient.norm is None or not gradient.norm:
        return 1.0
    return min(1.0, clip.max_norm / float(gradient.norm))
