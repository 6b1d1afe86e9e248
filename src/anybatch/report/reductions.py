"""Gradient of one batch under every reduction.

    G_R = sum_i c_i n_i grad m_i,    c = dR/dv           under the reduction R
    G_Sum = N G_Mean,                N = sum_i n_i       so lr_Sum = lr_Mean / N,

for optimisers whose step is the rate times a sum of gradients. Some settings have a scale of their
own. A penalty, a clip norm, a decay that is added to the gradient and an epsilon must be multiplied
by N too, and a number that is added to a square by N^2. The distance between two updates is that of
the optimiser's inputs, |U_Sum - N U_Mean| / |N U_Mean|.
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
from anybatch.report.evidence import Evidence, format_reduction, is_plain, norm, view_as_pairs
from anybatch.report.packing import narrow, pack
from anybatch.zoo.caffe import CaffeSGD

__all__ = ["describe_reductions"]

Gradients = Mapping[str, Tensor]

REDUCTIONS: tuple[tuple[Reduction, str], ...] = (
    (Mean(), "sum of the losses / sum of the counts"),
    (Sum(), "sum of the losses"),
    (Max(), "the largest loss"),
    (TopFraction(0.5), "mean of the larger half of the losses"),
    (Tilted(1.0), "log of the mean of exp(loss)"),
)
_BY_RATE = (optim.SGD, CaffeSGD)
_BY_DIRECTION = (optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RMSprop, optim.Adagrad)
_POWERS = {"eps": 1, "weight_decay": 1, "initial_accumulator_value": 2}


def describe_reductions(evidence: Evidence) -> dict[str, Any]:
    """Describe each reduction in a row, and how to go from Mean to Sum."""
    gradient = evidence.gradient
    if not is_plain(gradient):
        return {
            "why": "the objective has several terms, or several values an example: its reduction "
            "belongs to them, and no other takes its place."
        }
    (losses,) = gradient.terms.values()
    current = next(iter(evidence.objective.reductions.values())) if evidence.objective else None
    listed = list(REDUCTIONS)
    if losses.groups is not None:
        listed.append(
            (GroupDRO(1.0), "sum of q times the loss of each group, after one change of q")
        )
    if current is not None and current not in [reduction for reduction, _ in listed]:
        listed.append((current, "as the objective states it"))
    reduced = {format_reduction(r): (r.reduce(losses), text) for r, text in listed}
    gradients = {name: _compute_gradient_under(evidence, r) for name, (r, _) in reduced.items()}
    mean = gradients["Mean"]
    return {
        "own": None if current is None else format_reduction(current),
        "count": float(losses.weights.double().sum()),
        "rows": [
            _describe_row(name, text, r, losses, gradients[name], mean)
            for name, (r, text) in reduced.items()
        ],
        "compared": _compare_sum_and_mean(evidence, mean, gradients["Sum"], losses),
    }


def _compare_sum_and_mean(
    evidence: Evidence, mean: Gradients | None, total: Gradients | None, losses: ExampleLosses
) -> dict[str, Any] | None:
    """Compare Sum with Mean: learning rates that make them equal, penalty and clip norm."""
    if mean is None or total is None or evidence.objective is None:
        return None
    n = float(losses.weights.double().sum())
    (reduction,) = evidence.objective.reductions.values()
    figures: dict[str, Any] = {
        "norms": {"mean": norm(mean), "sum": norm(total)},
        "distance": _measure_distance(total, _add_penalty(mean, None, 0.0, n)),
        "rate": _compare_rates(evidence.optimizer, evidence.lr, reduction, n),
    }
    if evidence.objective.penalty is not None:
        penalty = evidence.penalty
        target = _add_penalty(mean, penalty, 1.0, n)
        figures["penalty"] = {
            "norm": norm(penalty),
            "unchanged": _measure_distance(_add_penalty(total, penalty, 1.0), target),
            "times_count": _measure_distance(_add_penalty(total, penalty, n), target),
        }
    if isinstance(evidence.clip, ClipNorm):
        figures["clip"] = _list_clip_cases(evidence.clip, mean, total, evidence.penalty, n)
    return figures


def _describe_row(
    name: str,
    text: str,
    reduced: Reduced,
    losses: ExampleLosses,
    gradient: Gradients | None,
    mean: Gradients | None,
) -> dict[str, Any]:
    weight = reduced.coefficients * losses.weights.to(reduced.coefficients)
    figures: dict[str, Any] = {
        "name": name,
        "formula": text,
        "value": float(reduced.value),
        "coefficients": pack(narrow(reduced.coefficients)),
        "weight": pack(narrow(weight / weight.sum())),  # share of each example
        "used": int((reduced.coefficients != 0).sum()),
    }
    if gradient is not None and mean is not None:
        lengths = norm(gradient), norm(mean)
        figures["norm"] = lengths[0]
        figures["ratio"] = lengths[0] / lengths[1] if lengths[1] else None
        inner = sum(float((gradient[k].double() * mean[k].double()).sum()) for k in mean)
        cosine = inner / (lengths[0] * lengths[1]) if all(lengths) else float("nan")
        figures["angle"] = float(torch.tensor(cosine).clamp(-1, 1).acos().rad2deg())
    return figures


def _compute_gradient_under(evidence: Evidence, reduced: Reduced) -> Gradients | None:
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

    def weigh(values: ExampleLosses) -> Tensor:
        return (fixed.to(values.values) * values.values).sum()

    objective = replace(evidence.objective, reduction={DATA: weigh}, penalty=None)
    clip = evidence.clip if isinstance(evidence.clip, ClipExamples) else None
    buffers = Buffers.of(evidence.model)
    arguments = {**evidence.arguments, "clip": clip}
    batch_gradient(evidence.model, objective, evidence.batch, **arguments)
    buffers.restore()
    names = survey_model(evidence.model).parameters
    return view_as_pairs({name: p.grad.clone() for name, p in names.items() if p.grad is not None})


def _compare_rates(
    optimizer: Optimizer | None, lr: float | None, reduction: Reduction, n: float
) -> dict[str, Any] | None:
    """Return the learning rates with which Mean and Sum make the same update."""
    if optimizer is None or lr is None or not isinstance(reduction, Mean | Sum):
        return None
    figures = {"optimizer": type(optimizer).__name__, "carried": _find_scaled_settings(optimizer)}
    if type(optimizer) in _BY_RATE:
        mean = lr if isinstance(reduction, Mean) else lr * n
        return figures | {"rule": "rate", "mean": mean, "sum": mean / n}
    if type(optimizer) in _BY_DIRECTION:
        return figures | {"rule": "direction", "mean": lr, "sum": lr}
    return figures | {"rule": None}


def _find_scaled_settings(optimizer: Optimizer) -> dict[str, int]:
    """Return the settings that Sum needs multiplied, and by which power of N."""

    def counts(group: Mapping[str, Any], name: str) -> bool:
        is_decoupled = name == "weight_decay" and group.get("decoupled_weight_decay")
        return bool(group.get(name)) and not is_decoupled

    groups = optimizer.param_groups
    return {name: p for name, p in _POWERS.items() if any(counts(g, name) for g in groups)}


def _list_clip_cases(
    clip: ClipNorm, mean: Gradients, total: Gradients, penalty: Gradients, n: float
) -> list[dict[str, Any]]:
    """Compare the clip under Mean with Sum, with the same max_norm and with N times it."""
    a, b = norm(_add_penalty(mean, penalty, 1.0)), norm(_add_penalty(total, penalty, n))
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


def _add_penalty(
    gradient: Gradients, penalty: Gradients | None, factor: float, scale: float = 1.0
) -> dict[str, Tensor]:
    """Compute scale * (gradient + factor * penalty), in float64."""
    if not penalty:
        return {name: scale * g.double() for name, g in gradient.items()}
    return {
        name: scale * (g.double() + factor * penalty[name].double()) for name, g in gradient.items()
    }


def _measure_distance(a: Gradients, b: Gradients) -> float:
    """Return the norm of the difference over the norm of the second."""
    difference = {name: a[name].double() - b[name].double() for name in b}
    return norm(difference) / (norm(b) or 1.0)
