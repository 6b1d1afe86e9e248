"""One update, stage by stage, with the numbers of a batch.

forward   v_i                        example by example
backward  grad m_i                   example by example
sum       sum_i n_i f_i grad m_i     one after the other
divide    G, by sum n under Mean;    any other reduction weighs with its own c_i
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
from anybatch.report.evidence import Evidence, contributions, is_plain
from anybatch.report.packing import narrowed, packed

__all__ = ["stages"]


def stages(evidence: Evidence, grams: Mapping[str, Tensor]) -> dict[str, Any]:
    """Gather the numbers of each stage that `layers` does not have.

    Args:
        grams: inner products of the examples' gradients [P, P] by parameter.
    """
    if not evidence.update:
        return {"why": "the model was not given: ab.explain(gradient, model=..., ...)."}
    assert evidence.objective is not None
    reductions = list(evidence.objective.reductions.values())
    found: dict[str, Any] = {
        "way": _way(reductions),
        "count": _count(evidence),
        "clip": _clip(evidence),
        "partial": _partial_sums(evidence, grams),
    }
    if evidence.ledger.norms is not None:
        found["mean_norm"] = float(evidence.ledger.norms.mean())
    return found


def _way(reductions: list[Reduction]) -> str:
    if len(reductions) == 1 and isinstance(reductions[0], Mean):
        return "divide"
    return "sum" if len(reductions) == 1 and isinstance(reductions[0], Sum) else "weigh"


def _count(evidence: Evidence) -> float | None:
    """sum n, where there is one."""
    if not is_plain(evidence.gradient):
        return None
    (term,) = evidence.gradient.terms.values()
    return float(term.weights.double().sum())


def _clip(evidence: Evidence) -> dict[str, Any] | None:
    clip, norms = evidence.clip, evidence.ledger.norms
    if clip is None:
        return None
    found: dict[str, Any] = {"kind": type(clip).__name__, "max_norm": clip.max_norm}
    if isinstance(clip, ClipExamples):
        assert norms is not None
        return found | {"shortened": int((norms > clip.max_norm).sum())}
    length = evidence.gradient.norm
    return found | {"norm": None if length is None else float(length)}


def _partial_sums(evidence: Evidence, grams: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """|sum of the first k| and the sum of lengths of the first k, of what each example adds to G,
    for k = 1 .. B; from <s_k, s_k> = <s_k-1, s_k-1> + 2 <s_k-1, a_k g_k> + |a_k g_k|^2."""
    a = contributions(evidence)
    if a is None or evidence.places is None or len(evidence.places) != len(a):
        return None
    own = a.double().cpu()
    gram = torch.stack([one.double() for one in grams.values()]).sum(0) * own[:, None] * own
    squares: Tensor = gram.cumsum(0).cumsum(1).diagonal().clamp(min=0)
    lengths = gram.diagonal().clamp(min=0).sqrt().cumsum(0)
    return {"sums": packed(narrowed(squares.sqrt().float())), "lengths": packed(lengths.float())}
