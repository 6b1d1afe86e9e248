"""The same batch under every reduction.

    G_R = sum_i c_i n_i grad m_i,    c = dR/dv           under the reduction R
    G_Sum = N G_Mean,                N = sum_i n_i       so lr_Sum = lr_Mean / N,

for optimisers whose step is the rate times a sum of gradients. What sets a scale of its own does
not follow: a penalty, a clip norm, a decay that is added to the gradient and an epsilon have to be
multiplied by N too, and what is added to a square by N^2. How far two updates are from
each other is measured on what the optimiser gets, |U_Sum - N U_Mean| / |N U_Mean|.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from anybatch.example_losses import ExampleLosses
from anybatch.gradient import ClipExamples, ClipNorm, batch_gradient
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import survey_model
from anybatch.objective import DATA
from anybatch.reductions import GroupDRO, Max, Mean, Reduced, Reduction, Sum, Tilted, TopFraction
from anybatch.report.evidence import Evidence, in_pairs, is_plain, named, norm
from anybatch.report.packing import narrowed, packed
from anybatch.zoo.caffe import CaffeSGD

__all__ = ["compared", "reductions"]

Gradients = Mapping[str, Tensor]

EVERY: tuple[tuple[Reduction, str], ...] = (
    (Mean(), "sum v / sum n"),
    (Sum(), "sum v"),
    (Max(), "max m"),
    (TopFraction(0.5), "mean of the larger half of m"),
    (Tilted(1.0), "log mean exp(m)"),
)
_BY_RATE = (optim.SGD, CaffeSGD)
_BY_DIRECTION = (optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RMSprop, optim.Adagrad)
_POWERS = {"eps": 1, "weight_decay": 1, "initial_accumulator_value": 2}


def reductions(evidence: Evidence) -> dict[str, Any]:
    """Gather a row per reduction, and how to go from Mean to Sum."""
    gradient = evidence.gradient
    if not is_plain(gradient):
        return {
            "why": "the objective has several terms, or several values an example: its reduction "
            "belongs to them, and no other takes its place."
        }
    (losses,) = gradient.terms.values()
    own = next(iter(evidence.objective.reductions.values())) if evidence.objective else None
    listed = list(EVERY)
    if losses.groups is not None:
        listed.append((GroupDRO(1.0), "sum q_g L_g, after one tilt of q"))
    if own is not None and own not in [reduction for reduction, _ in listed]:
        listed.append((own, "as the objective states it"))
    made = {named(r): (r.reduce(losses), text) for r, text in listed}
    found = {name: _gradient_under(evidence, reduced) for name, (reduced, _) in made.items()}
    mean, run = found["Mean"], None if own is None else named(own)
    return {
        "own": run,
        "count": float(losses.weights.double().sum()),
        "rows": [
            _row(name, text, reduced, losses, found[name], mean)
            for name, (reduced, text) in made.items()
        ],
        "compared": compared(evidence, mean, found["Sum"], losses),
    }


def compared(
    evidence: Evidence, mean: Gradients | None, total: Gradients | None, losses: ExampleLosses
) -> dict[str, Any] | None:
    """Compare Sum with Mean: learning rates that make them equal, penalty and clip norm."""
    if mean is None or total is None or evidence.objective is None:
        return None
    n = float(losses.weights.double().sum())
    (own,) = evidence.objective.reductions.values()
    found: dict[str, Any] = {
        "norms": {"mean": norm(mean), "sum": norm(total)},
        "distance": _distance(total, _plus(mean, None, 0.0, n)),
        "rate": _rate(evidence.optimizer, evidence.lr, own, n),
    }
    if evidence.objective.penalty is not None:
        penalty = evidence.penalty
        target = _plus(mean, penalty, 1.0, n)
        found["penalty"] = {
            "norm": norm(penalty),
            "unchanged": _distance(_plus(total, penalty, 1.0), target),
            "times_count": _distance(_plus(total, penalty, n), target),
        }
    if isinstance(evidence.clip, ClipNorm):
        found["clip"] = _clipped(evidence.clip, mean, total, evidence.penalty, n)
    return found


def _row(
    name: str,
    text: str,
    reduced: Reduced,
    losses: ExampleLosses,
    gradient: Gradients | None,
    mean: Gradients | None,
) -> dict[str, Any]:
    weight = reduced.coefficients * losses.weights.to(reduced.coefficients)
    found: dict[str, Any] = {
        "name": name,
        "formula": text,
        "value": float(reduced.value),
        "coefficients": packed(narrowed(reduced.coefficients)),
        "weight": packed(narrowed(weight / weight.sum())),  # of each example, of all
        "used": int((reduced.coefficients != 0).sum()),
    }
    if gradient is not None and mean is not None:
        lengths = norm(gradient), norm(mean)
        found["norm"] = lengths[0]
        found["ratio"] = lengths[0] / lengths[1] if lengths[1] else None
        inner = sum(float((gradient[k].double() * mean[k].double()).sum()) for k in mean)
        cosine = inner / (lengths[0] * lengths[1]) if all(lengths) else float("nan")
        found["angle"] = float(torch.tensor(cosine).clamp(-1, 1).acos().rad2deg())
    return found


def _gradient_under(evidence: Evidence, reduced: Reduced) -> Gradients | None:
    """Compute G_R from the examples' gradients if all are known, else by another pass."""
    (losses,) = evidence.gradient.terms.values()
    if evidence.places is not None and len(evidence.places) == len(losses.values):
        a = reduced.coefficients * losses.weights.to(reduced.coefficients)
        if isinstance(evidence.clip, ClipExamples) and evidence.ledger.norms is not None:
            a = a * evidence.clip.factors(evidence.ledger.norms)
        return {
            name: torch.mv(g.reshape(len(g), -1).T, a.to(g)).view(g.shape[1:])
            for name, g in evidence.whole.items()
        }
    if evidence.model is None or evidence.objective is None:
        return None
    fixed = reduced.coefficients

    def weighed(values: ExampleLosses) -> Tensor:
        return (fixed.to(values.values) * values.values).sum()

    objective = replace(evidence.objective, reduction={DATA: weighed}, penalty=None)
    clip = evidence.clip if isinstance(evidence.clip, ClipExamples) else None
    buffers = Buffers.of(evidence.model)
    batch_gradient(evidence.model, objective, evidence.batch, **{**evidence.how, "clip": clip})
    buffers.restore()
    names = survey_model(evidence.model).parameters
    return in_pairs({name: p.grad.clone() for name, p in names.items() if p.grad is not None})


def _rate(
    optimizer: Optimizer | None, lr: float | None, own: Reduction, n: float
) -> dict[str, Any] | None:
    """Return the learning rates with which Mean and Sum make the same update."""
    if optimizer is None or lr is None or not isinstance(own, Mean | Sum):
        return None
    found = {"optimizer": type(optimizer).__name__, "carried": _carried(optimizer)}
    if type(optimizer) in _BY_RATE:
        mean = lr if isinstance(own, Mean) else lr * n
        return found | {"rule": "rate", "mean": mean, "sum": mean / n}
    if type(optimizer) in _BY_DIRECTION:
        return found | {"rule": "direction", "mean": lr, "sum": lr}
    return found | {"rule": None}


def _carried(optimizer: Optimizer) -> dict[str, int]:
    """Return the settings that Sum needs multiplied by N, and by which power of N."""

    def counts(group: Mapping[str, Any], name: str) -> bool:
        is_decoupled = name == "weight_decay" and group.get("decoupled_weight_decay")
        return bool(group.get(name)) and not is_decoupled

    groups = optimizer.param_groups
    return {name: p for name, p in _POWERS.items() if any(counts(g, name) for g in groups)}


def _clipped(
    clip: ClipNorm, mean: Gradients, total: Gradients, penalty: Gradients, n: float
) -> list[dict[str, Any]]:
    """Clip under Mean, and under Sum with the same max_norm and with N times it."""
    a, b = norm(_plus(mean, penalty, 1.0)), norm(_plus(total, penalty, n))
    cases = (("Mean", a, 1.0), ("Sum, the same norm", b, 1.0), ("Sum, N times the norm", b, n))
    return [
        {
            "case": case,
            "norm": length,
            "max_norm": clip.max_norm * times,
            "factor": min(1.0, clip.max_norm * times / length) if length else 1.0,
        }
        for case, length, times in cases
    ]


def _plus(
    gradient: Gradients, penalty: Gradients | None, factor: float, scale: float = 1.0
) -> dict[str, Tensor]:
    """scale * (gradient + factor * penalty), in float64."""
    if not penalty:
        return {name: scale * g.double() for name, g in gradient.items()}
    return {
        name: scale * (g.double() + factor * penalty[name].double()) for name, g in gradient.items()
    }


def _distance(a: Gradients, b: Gradients) -> float:
    """Return the norm of the difference over the norm."""
    difference = {name: a[name].double() - b[name].double() for name in b}
    return norm(difference) / (norm(b) or 1.0)
