"""Contribution of each example to the update, and how much of it cancels.

angle of i        arccos <grad m_i, G> / (|grad m_i| |G|)
contribution      |a_i| |grad m_i|, the length of its term of G = sum_i a_i grad m_i
cancellation      1 - |G| / sum_i |a_i| |grad m_i|, of all weights or of one parameter's
"""

import math
from typing import Any

import torch
from torch import Tensor

from anybatch import pytree
from anybatch.batch import get_inputs
from anybatch.example_losses import ExampleLosses
from anybatch.report.evidence import Evidence, compute_contributions, norm
from anybatch.report.packing import narrow, pack
from anybatch.report.pictures import Labels, describe_inputs

__all__ = ["Labels", "describe_examples"]


def describe_examples(evidence: Evidence, labels: Labels) -> dict[str, Any]:
    """Describe every example of the batch."""
    gradient, ledger = evidence.gradient, evidence.ledger
    size = len(next(iter(gradient.terms.values())).values)
    ids = torch.arange(size) if gradient.ids is None else gradient.ids
    pictures = None
    if evidence.batch is not None:
        pictures = describe_inputs(get_inputs(pytree.prepare_batch(evidence.batch)), labels)
    figures: dict[str, Any] = {
        "size": size,
        "ids": ids.tolist(),
        "terms": [_describe_term(name, term, evidence) for name, term in gradient.terms.items()],
        "labels": labels.name_classes(labels.classes),
        "predicted": labels.name_classes(labels.predicted),
        "pictures": pictures,
        "unseen": evidence.unseen,
    }
    a = compute_contributions(evidence)
    if ledger.norms is not None and a is not None:
        figures |= {"norms": pack(narrow(ledger.norms)), "factors": pack(narrow(a))}
    if ledger.share is not None:
        figures["share"] = pack(narrow(ledger.share))
    length = _measure_sum(evidence, a)
    if ledger.alignment is not None and ledger.norms is not None and length is not None:
        figures["angles"] = pack(_compute_angles(ledger.alignment, ledger.norms, length))
    return figures | {"cancelled": _measure_cancellation(evidence, a, length)}


def _describe_term(name: str, term: ExampleLosses, evidence: Evidence) -> dict[str, Any]:
    """Describe one term of the loss: each example's value and count."""
    if term.values.ndim > 1:
        return {"name": name, "numbers": term.values.shape[1]}
    c = evidence.gradient.term_coefficients[name]
    figures = {"name": name, "losses": pack(narrow(term.means)), "coefficients": pack(narrow(c))}
    if term.counts is not None:
        figures["counts"] = pack(narrow(term.weights))
    return figures


def _compute_angles(alignment: Tensor, norms: Tensor, length: float) -> Tensor:
    """Compute angles in degrees; NaN for a gradient of 0, which has no direction."""
    cosine = alignment.double() / (norms.double() * length)
    return cosine.clamp(-1, 1).acos().rad2deg().float()


def _measure_sum(evidence: Evidence, a: Tensor | None) -> float | None:
    """Compute |G|; from |G|^2 = sum_i a_i <grad m_i, G> if G is not known."""
    if evidence.data:
        return norm(evidence.data)
    if a is None or evidence.ledger.alignment is None:
        return None
    square = float((a * evidence.ledger.alignment).double().sum())
    return math.sqrt(max(square, 0.0))


def _measure_cancellation(
    evidence: Evidence, a: Tensor | None, length: float | None
) -> dict[str, Any] | None:
    """Compare the length of the sum with the sum of the lengths, in all and by parameter."""
    ledger = evidence.ledger
    if a is None or ledger.norms is None or length is None:
        return None
    norms = (ledger.parameter_norms or {}) if evidence.data else {}
    lengths = {name: float((a.abs() * each).double().sum()) for name, each in norms.items()}
    return {
        "sum": length,
        "lengths": float((a.abs() * ledger.norms).double().sum()),
        "parameters": [
            {"name": name, "sum": norm({name: evidence.data[name]}), "lengths": total}
            for name, total in lengths.items()
        ],
    }
