"""Pairs of examples: where their gradients agree, and where they cancel.

    <g_i, g_j> by parameter, for all pairs        by Gram matrices, K = D D^T of the rows g_i
    g_i at a few hundred weights, for all i       what shows single weights

g_i = grad m_i. The weights shown are, of each parameter, those with the largest sum_i |g_i|. They
are few of all, so the page says what part of <g_i, g_j> they make up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch.report.evidence import Evidence
from anybatch.report.packing import narrowed, packed

__all__ = ["followed", "grams", "pairs", "weights"]

PRODUCTS = 320_000  # inner products in a page, at most: some 1.7 MB of text
WEIGHTS = 512  # followed in all, at most, but for a few of each parameter


def grams(evidence: Evidence) -> dict[str, Tensor]:
    """<g_i, g_j> of the examples whose gradients are whole: [P, P] by parameter, on the CPU."""
    rows = {name: g.reshape(len(g), -1) for name, g in evidence.whole.items()}
    return {name: narrowed((g @ g.T).cpu()) for name, g in rows.items()}


def pairs(
    evidence: Evidence, grams: Mapping[str, Tensor], followed: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Gather inner products of all pairs, and single weights of each example."""
    if evidence.places is None or len(evidence.places) < 2:
        return {"why": evidence.no_whole or "a batch of one example has no pairs."}
    num, ledger = len(evidence.places), evidence.ledger
    kept, most = torch.arange(num), _most_examples(len(grams))
    by = ledger.norms if ledger.share is None else ledger.share
    if most < num and by is not None:
        of_these = by[evidence.places.to(by.device)].abs().cpu()
        kept = of_these.topk(most).indices.sort().values
    rows, columns = torch.tril_indices(len(kept), len(kept))
    inner = [gram[kept][:, kept][rows, columns] for gram in grams.values()]
    return {
        "places": evidence.places[kept].tolist(),
        "parameters": list(grams),
        "inner": packed(torch.stack(inner, 1)),  # [P (P + 1) / 2, L], row i from (i, 0) to (i, i)
        "gradients": packed(_at(evidence.whole, followed)[kept]),  # [P, M]
    }


def followed(evidence: Evidence) -> dict[str, Tensor]:
    """Choose the weights to show: their places in each flattened parameter."""
    if not evidence.whole:
        return {}
    num = max(4, WEIGHTS // len(evidence.whole))
    return {
        name: _sizes(g).topk(min(num, g[0].numel())).indices.cpu()
        for name, g in evidence.whole.items()
    }


def weights(evidence: Evidence, followed: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Gather the weights shown: where they are, and their value after each stage."""
    if not followed:
        return None
    stages = {
        "before": evidence.before,
        "data": evidence.data,
        "penalty": evidence.penalty,
        "update": evidence.update,
        "after": evidence.after,
    }
    return {
        "parameters": [
            {"name": name, "places": _index(places, evidence.whole[name].shape[1:])}
            for name, places in followed.items()
        ],
        **{
            stage: packed(
                torch.cat([narrowed(t[name].flatten().cpu()[p]) for name, p in followed.items()])
            )
            for stage, t in stages.items()
            if t
        },
    }


def _sizes(g: Tensor) -> Tensor:
    """sum_i |g_i| of each weight."""
    found: Tensor = torch.linalg.vector_norm(g.reshape(len(g), -1), ord=1, dim=0)
    return found


def _index(places: Tensor, shape: torch.Size) -> list[list[int]]:
    """Turn flat places into one index per dimension."""
    return torch.stack(torch.unravel_index(places, shape), 1).tolist() if shape else [[]]


def _at(whole: Mapping[str, Tensor], followed: Mapping[str, Tensor]) -> Tensor:
    """Return each example's gradient at the weights shown: [P, M]."""
    flat = {name: g.reshape(len(g), -1) for name, g in whole.items()}
    found = [flat[name][:, places.to(flat[name].device)] for name, places in followed.items()]
    return narrowed(torch.cat(found, 1).cpu())


def _most_examples(num_parameters: int) -> int:
    return max(2, int((2 * PRODUCTS / num_parameters) ** 0.5))
