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
    products = _multiply_terms(evidence, grams)
    reductions = list(evidence.objective.reductions.values())
    figures: dict[str, Any] = {
        "way": _find_way(reductions),
        "count": _count_examples(evidence),
        "clip": _describe_clip(evidence),
        "partial": None if products is None else _compute_partial_sums(products),
        "firsts": None if products is None else _compare_firsts(evidence, products),
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


def _multiply_terms(evidence: Evidence, grams: Mapping[str, Tensor]) -> Tensor | None:
    """Compute <a_i g_i, a_j g_j> [B, B], the inner products of the terms of G."""
    a = compute_contributions(evidence)
    if a is None or evidence.places is None or len(evidence.places) != len(a):
        return None
    a = a.double().cpu()
    gram: Tensor = torch.stack([g.double() for g in grams.values()]).sum(0)
    return gram * a[:, None] * a


def _compute_partial_sums(products: Tensor) -> dict[str, Any]:
    """Compute |s_k|, s_k the sum of the first k terms of G, and the sum of their lengths.

    <s_k, s_k> = <s_k-1, s_k-1> + 2 <s_k-1, a_k g_k> + |a_k g_k|^2,    k = 1 .. B
    """
    squares = _square_sums(products)
    lengths = products.diagonal().clamp(min=0).sqrt().cumsum(0)
    return {"sums": pack(narrow(squares.sqrt().float())), "lengths": pack(lengths.float())}


def _compare_firsts(evidence: Evidence, products: Tensor) -> dict[str, Any] | None:
    """Compare the mean gradient of the first k examples with that of all B.

    g_k = s_k N / N_k,    N_k the count of the first k, N that of all;  G = g_B

    Returns:
        |g_k| / |G|, the angle between them in degrees, and |g_k - G| / |G|; None for a reduction
        that is neither Mean nor Sum, or where G is 0.
    """
    assert evidence.objective is not None
    reductions = list(evidence.objective.reductions.values())
    total = float(products.sum())
    if _find_way(reductions) == "weigh" or not is_plain(evidence.gradient) or not total > 0:
        return None
    (term,) = evidence.gradient.terms.values()
    counts, length = term.weights.double().cpu(), total**0.5
    sizes = _square_sums(products).sqrt()
    ratios = sizes / length * counts.sum() / counts.cumsum(0)
    cosines = (products.sum(1).cumsum(0) / (sizes * length)).clamp(-1, 1)
    distances = (ratios.square() + 1 - 2 * ratios * cosines).clamp(min=0).sqrt()
    figures = {"ratios": ratios, "angles": cosines.acos().rad2deg(), "distances": distances}
    return {name: pack(values.float()) for name, values in figures.items()}


def _square_sums(products: Tensor) -> Tensor:
    """Compute |s_k|^2, k = 1 .. B."""
    squares: Tensor = products.cumsum(0).cumsum(1).diagonal().clamp(min=0)
    return squares
