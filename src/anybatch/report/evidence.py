"""One update, observed by the ledger, with its gradients, penalty and weights.

    G = sum_i a_i grad m_i          of the data term,   a_i = c_i n_i f_i
    U = clip(G + grad Omega)        what the optimiser gets
    w' = optimiser(w, U)            the weights are then reset to w

G is computed from U by undoing clip and penalty, so it is rounded as U is.

f_i = min(1, M / |grad m_i|) under `ClipExamples(M)`, else 1. If an objective has several terms,
or values of several numbers, grad m_i is the example's term of G, and a_i = f_i.
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
    "add_example_gradients",
    "collect_evidence",
    "compute_contributions",
    "format_reduction",
    "is_plain",
    "norm",
    "view_as_pairs",
]

MAX_ELEMENTS = 2**28
"""Most numbers of examples' gradients in memory at once: 1 GiB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """An update and its parts; None or empty if not known."""

    gradient: Gradient
    unseen: str | None = None  # why the ledger has nothing on the examples
    model: nn.Module | None = None  # with the weights before the update
    objective: Objective | None = None
    batch: Any = None  # as `batch_gradient` takes it
    arguments: Mapping[str, Any] = field(default_factory=dict)  # others of `batch_gradient`
    optimizer: Optimizer | None = None
    lr: float | None = None  # of the first parameter group
    before: Mapping[str, Tensor] = field(default_factory=dict)  # w by parameter
    after: Mapping[str, Tensor] = field(default_factory=dict)  # w'; empty without an optimiser
    data: Mapping[str, Tensor] = field(default_factory=dict)  # G
    penalty: Mapping[str, Tensor] = field(default_factory=dict)  # grad Omega
    update: Mapping[str, Tensor] = field(default_factory=dict)  # U
    places: Tensor | None = None  # [P], in the batch, of the examples with whole gradients
    whole: Mapping[str, Tensor] = field(default_factory=dict)  # grad m_i of these, [P, ...]
    no_whole: str | None = None  # why there are none

    @property
    def ledger(self) -> Ledger:
        """Ledger of the update; empty if nothing was observed."""
        return self.gradient.ledger or Ledger()

    @property
    def clip(self) -> ClipNorm | ClipExamples | None:
        """Clip of the update."""
        clip: ClipNorm | ClipExamples | None = self.arguments.get("clip")
        return clip


def collect_evidence(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    optimizer: Optimizer | None = None,
    *,
    ids: Tensor | None = None,
    **arguments: Any,
) -> Evidence:
    """Make one update, collect its parts, and undo it.

    Args:
        model: its weights and buffers are restored; its `.grad` and the optimiser's state are
            not.
        objective: what to minimise.
        batch: a pytree whose leaves have the examples first.
        optimizer: over the model's parameters; None: no update is made.
        ids: [B], the examples' ids.
        arguments: further ones of `batch_gradient`, such as key, clip and layout.

    Raises:
        DivergenceError: a gradient that is not finite; and all that `batch_gradient` raises.
    """
    names, buffers = survey_model(model).parameters, Buffers.of(model)
    before = {name: p.detach().clone() for name, p in names.items()}
    gradient, unseen = _compute_gradient(model, objective, batch, ids, before, arguments)
    buffers.restore()
    if not gradient.is_finite:
        raise DivergenceError(
            "The gradient of this batch is not finite, so it makes no update. A run skips such a "
            "batch. Choose another one."
        )
    update = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
    penalty = {name: torch.zeros_like(total) for name, total in update.items()}
    penalties.add_gradients(objective.penalty, model, penalty)
    factor = _compute_clip_factor(gradient, arguments.get("clip"))
    data = {name: total / factor - penalty[name] for name, total in update.items()}
    after = {} if optimizer is None else _try_step(names, before, optimizer)
    evidence = Evidence(
        gradient=gradient,
        unseen=unseen,
        model=model,
        objective=objective,
        batch=batch,
        arguments=arguments,
        optimizer=optimizer,
        lr=None if optimizer is None else float(optimizer.param_groups[0]["lr"]),
        before=view_as_pairs(before),
        after=view_as_pairs(after),
        data=view_as_pairs(data),
        penalty=view_as_pairs(penalty),
        update=view_as_pairs(update),
    )
    return add_example_gradients(evidence)


def _try_step(
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
    """Return whether each example has exactly one loss."""
    terms = list(gradient.terms.values())
    return len(terms) == 1 and terms[0].values.ndim == 1


def compute_contributions(evidence: Evidence) -> Tensor | None:
    """Compute a_i [B], the factor of each grad m_i in G; None if norms are not known."""
    gradient, norms = evidence.gradient, evidence.ledger.norms
    if norms is None:
        return None
    a = torch.ones_like(norms)
    if is_plain(gradient):
        (term,), (c,) = gradient.terms.values(), gradient.term_coefficients.values()
        a = c.to(norms) * term.weights.to(norms)
    clip = evidence.clip
    return a * clip.factors(norms) if isinstance(clip, ClipExamples) else a


def _select_examples(batch: Any, places: Tensor) -> Any:
    """Select the examples at these places of a batch, as a batch."""
    if isinstance(batch, Uncollated):
        return Uncollated([batch.examples[i] for i in places.tolist()], batch.collate)

    def select(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, Shared):
            return leaf
        return leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf[places.numpy()]

    return map_leaves(select, batch)


def format_reduction(reduction: Reduction) -> str:
    """Format a reduction: "Mean", "TopFraction(q=0.5)", the name of a function."""
    if isinstance(reduction, Function):
        return getattr(reduction.function, "__name__", type(reduction.function).__name__)
    if isinstance(reduction, Scaled):
        return f"{reduction.scale:g} * {format_reduction(reduction.reduction)}"
    return str(reduction).removesuffix("()")


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm over all elements, added up in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def view_as_pairs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """View complex numbers as pairs of real ones, which have the same norms and products."""
    return {
        name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        for name, t in tensors.items()
    }


def _compute_gradient(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    ids: Tensor | None,
    weights: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
) -> tuple[Gradient, str | None]:
    """Compute the gradient, with a ledger if the model allows it, or the reason why not."""
    size = pytree.count_examples(batch)
    reductions = list(objective.reductions.values())
    is_linear = len(reductions) == 1 and reductions[0].factor(1.0, 1) is not None
    observe = Observe(
        parameter_norms=True,
        alignment=True,
        share=True,
        noise_scale=is_linear and size > 1 and not isinstance(arguments.get("clip"), ClipExamples),
        gradients=size * sum(w.numel() for w in weights.values()) <= MAX_ELEMENTS,
    )
    try:
        return batch_gradient(model, objective, batch, ids=ids, observe=observe, **arguments), None
    except LedgerError as error:
        if isinstance(arguments.get("clip"), ClipExamples):
            raise
        return batch_gradient(model, objective, batch, ids=ids, **arguments), str(error)


def add_example_gradients(evidence: Evidence) -> Evidence:
    """Add the whole gradients of as many examples as fit in memory.

    If not all fit, those with the largest share pass once more on their own. Their gradients stay
    the same, unless the model draws random numbers or couples examples.
    """
    gradient, ledger = evidence.gradient, evidence.ledger
    if ledger.norms is None:
        return replace(evidence, no_whole=evidence.unseen or "the gradient was not observed.")
    if ledger.gradients is not None:
        places, whole = torch.arange(len(ledger.norms)), view_as_pairs(ledger.gradients)
        data = evidence.data or _sum_examples(evidence, whole)
        return replace(evidence, places=places, whole=whole, data=data)
    if evidence.model is None or evidence.objective is None or ledger.share is None:
        return replace(evidence, no_whole="whole example gradients were not observed.")
    num_weights = sum(w.numel() for w in evidence.before.values())
    num = MAX_ELEMENTS // num_weights
    reason = find_grain_reason(evidence.model, evidence.objective.example_losses)
    if num < 2 or reason is not None or not is_plain(gradient):
        why = (
            f"whole gradients of {num_weights:,} weights for each example do not fit in memory here"
        )
        return replace(evidence, no_whole=why + (f", and {reason}." if reason else "."))
    places = ledger.share.abs().topk(num).indices.sort().values.cpu()
    arguments = {
        name: value for name, value in evidence.arguments.items() if name in ("key", "precision")
    }
    again = batch_gradient(
        evidence.model,
        Objective(evidence.objective.example_losses, evidence.objective.reduction),
        _select_examples(evidence.batch, places),
        observe=Observe(gradients=True),
        **arguments,
    )
    assert again.ledger is not None
    return replace(evidence, places=places, whole=view_as_pairs(again.ledger.gradients or {}))


def _sum_examples(evidence: Evidence, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute G from the gradients of all examples."""
    a = compute_contributions(evidence)
    assert a is not None
    return {name: torch.tensordot(a.to(g), g, 1) for name, g in whole.items()}


def _compute_clip_factor(gradient: Gradient, clip: object) -> float:
    """Return the factor by which the whole gradient was clipped."""
    if not isinstance(clip, ClipNorm) or gradient.norm is None or not gradient.norm:
        return 1.0
    return min(1.0, clip.max_norm / float(gradient.norm))
