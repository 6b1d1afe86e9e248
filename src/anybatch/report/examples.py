"""Each example's part in the update, and how much of it cancels.

angle of i        arccos <grad m_i, G> / (|grad m_i| |G|)
adds              |a_i| |grad m_i|, the length of what it adds to G = sum_i a_i grad m_i
what cancels      1 - |G| / sum_i |a_i| |grad m_i|, of all weights or of one parameter's
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch import pytree
from anybatch.batch import get_inputs
from anybatch.example_losses import ExampleLosses
from anybatch.report.evidence import Evidence, contributions, norm
from anybatch.report.packing import narrowed, packed
from anybatch.report.pictures import Labels, pictures

__all__ = ["Labels", "examples"]


def examples(evidence: Evidence, labels: Labels) -> dict[str, Any]:
    """Gather what is known of every example of the batch."""
    gradient, ledger = evidence.gradient, evidence.ledger
    size = len(next(iter(gradient.terms.values())).values)
    ids = torch.arange(size) if gradient.ids is None else gradient.ids
    found: dict[str, Any] = {
        "size": size,
        "ids": ids.tolist(),
        "terms": [_term(name, term, evidence) for name, term in gradient.terms.items()],
        "labels": labels.of(labels.classes),
        "predicted": labels.of(labels.predicted),
        "pictures": None if evidence.batch is None else _pictures(evidence, labels),
        "unseen": evidence.unseen,
    }
    a = contributions(evidence)
    if ledger.norms is not None and a is not None:
        found |= {"norms": packed(narrowed(ledger.norms)), "factors": packed(narrowed(a))}
    if ledger.share is not None:
        found["share"] = packed(narrowed(ledger.share))
    length = _length(evidence, a)
    if ledger.alignment is not None and ledger.norms is not None and length is not None:
        found["angles"] = packed(_angles(ledger.alignment, ledger.norms, length))
    return found | {"cancelled": _cancelled(evidence, a, length)}


def _term(name: str, term: ExampleLosses, evidence: Evidence) -> dict[str, Any]:
    """Gather one term of the loss: each example's value, and how much it counts."""
    if term.values.ndim > 1:
        return {"name": name, "numbers": term.values.shape[1]}
    c = evidence.gradient.term_coefficients[name]
    found = {
        "name": name,
        "losses": packed(narrowed(term.means)),
        "coefficients": packed(narrowed(c)),
    }
    if term.counts is not None:
        found["counts"] = packed(narrowed(term.weights))
    return found


def _pictures(evidence: Evidence, labels: Labels) -> dict[str, Any] | None:
    return pictures(get_inputs(pytree.prepare_batch(evidence.batch)), labels)


def _angles(alignment: Tensor, norms: Tensor, length: float) -> Tensor:
    """Compute angles in degrees; NaN for a gradient of 0, which has no direction."""
    cosine = alignment.double() / (norms.double() * length)
    return cosine.clamp(-1, 1).acos().rad2deg().float()


def _length(evidence: Evidence, a: Tensor | None) -> float | None:
    """|G|; from |G|^2 = sum_i a_i <grad m_i, G> where G itself is not known."""
    if evidence.data:
        return norm(evidence.data)
    if a is None or evidence.ledger.alignment is None:
        return None
    square = float((a * evidence.ledger.alignment).double().sum())
    return math.sqrt(max(square, 0.0))


def _cancelled(evidence: Evidence, a: Tensor | None, length: float | None) -> dict[str, Any] | None:
    """Compare the length of the sum with the sum of the lengths, by parameter too."""
    ledger = evidence.ledger
    if a is None or ledger.norms is None or length is None:
        return None
    each = _lengths(a, ledger.parameter_norms or {}) if evidence.data else {}
    return {
        "sum": length,
        "lengths": float((a.abs() * ledger.norms).double().sum()),
        "parameters": [
            {"name": name, "sum": norm({name: evidence.data[name]}), "lengths": lengths}
            for name, lengths in each.items()
        ],
    }


def _lengths(a: Tensor, norms: Mapping[str, Tensor]) -> dict[str, float]:
    """sum_i |a_i| |grad m_i| by parameter."""
    return {name: float((a.abs() * own).double().sum()) for name, own in norms.items()}
