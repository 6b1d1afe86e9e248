"""Describe one update stage by stage, with the numbers of a batch.

forward   v_i                        example by example
backward  grad m_i                   example by example
sum       sum_i n_i f_i grad m_i     one after the other
divide    G, by sum n under Mean;    another reduction multiplies by its own c_i
penalty   G + grad Omega
clip      U
optimise  w' = optimiser(w, U)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch.gradient import ClipExamples
from anybatch.reductions import Mean, Reduction, Sum
from anybatch.report.evidence import Evidence, compute_contributions, is_plain
from anybatch.report.packing import narrow, pack

__all__ = ["describe_stages"]


def describe_stages(evidence: Evidence, grams: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe the numbers of each stage, except those of `describe_layers`.

    Args:
        grams: inner products of the examples' gradients [P, P] by parameter.
    """
    if not evidence.update:
        return {"why": "the model was not given: ab.explain(gradient, model=..., ...)."}
    assert evidence.objective is not None
    reductions = list(evidence.objective.reductions.values())
    figures: dict[str, Any] = {
        "way": _find_way(reductions),
        "count": _count_examples(evidence),
        "clip": _describe_clip(evidence),
        "partial": _compute_partial_sums(evidence, grams),
    }
    if evidence.ledger.norms is not None:
        figures["mean_norm"] = float(evidence.ledger.norms.mean())
    return figures


def _find_way(reductions: list[Reduction]) -> str:
    if len(reductions) == 1 and isinstance(reductions[0], Mean):
        return "divide"
    return "sum" if len(reductions) == 1 and isinstance(reductions[0], Sum) else "weigh"


def _count_examples(evidence: Evidence) -> float | None:
    """Return sum n, if there is one term."""
    if not is_plain(evidence.gradient):
        return None
    (term,) = evidence.gradient.terms.values()
    return float(term.weights.double().sum())


def _describe_clip(evidence: Evidence) -> dict[str, Any] | None:
    clip, norms = evidence.clip, evidence.ledger.norms
    if clip is None:
        return None
    figures: dict[str, Any] = {"kind": type(clip).__name__, "max_norm": clip.max_norm}
    if isinstance(clip, ClipExamples):
        assert norms is not None
        return figures | {"shortened": int((norms > clip.max_norm).sum())}
    length = evidence.gradient.norm
    return figures | {"norm": None if length is None else float(length)}


def _compute_partial_sums(evidence: Evidence, grams: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Compute |s_k|, s_k the sum of the first k terms of G, and the sum of their lengths.

    <s_k, s_k> = <s_k-1, s_k-1> + 2 <s_k-1, a_k g_k> + |a_k g_k|^2,    k = 1 .. B
    """
    a = compute_contributions(evidence)
    if a is None or evidence.places is None or len(evidence.places) != len(a):
        return None
    a = a.double().cpu()
    gram = torch.stack([g.double() for g in grams.values()]).sum(0) * a[:, None] * a
    squares: Tensor = gram.cumsum(0).cumsum(1).diagonal().clamp(min=0)
    lengths = gram.diagonal().clamp(min=0).sqrt().cumsum(0)
    return {"sums": pack(narrow(squares.sqrt().float())), "lengths": pack(lengths.float())}
