"""Pairs of examples: where their gradients agree, and where they cancel.

    <g_i, g_j> by parameter, for all pairs        by Gram matrices, K = D D^T of the rows g_i
    g_i at a few hundred weights, for all i

g_i = grad m_i. Of each parameter the weights with the largest sum_i |g_i| are shown. They are few,
so the page says which share of <g_i, g_j> they make up.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anybatch.report.evidence import Evidence
from anybatch.report.packing import narrow, pack

__all__ = ["choose_weights", "compute_grams", "describe_pairs", "describe_weights"]

MAX_PRODUCTS = 320_000  # inner products in a page: some 1.7 MB of text
NUM_WEIGHTS = 512  # to choose in all, but a few of each parameter


def compute_grams(evidence: Evidence) -> dict[str, Tensor]:
    """Compute <g_i, g_j> of the examples with whole gradients: [P, P] by parameter, on the CPU."""
    rows = {name: g.reshape(len(g), -1) for name, g in evidence.whole.items()}
    return {name: narrow((g @ g.T).cpu()) for name, g in rows.items()}


def describe_pairs(
    evidence: Evidence, grams: Mapping[str, Tensor], followed: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Describe the inner products of all pairs, and single weights of each example."""
    if evidence.places is None or len(evidence.places) < 2:
        return {"why": evidence.no_whole or "a batch of one example has no pairs."}
    num, ledger = len(evidence.places), evidence.ledger
    subset, most = torch.arange(num), max(2, int((2 * MAX_PRODUCTS / len(grams)) ** 0.5))
    by = ledger.norms if ledger.share is None else ledger.share
    if most < num and by is not None:
        sizes = by[evidence.places.to(by.device)].abs().cpu()
        subset = sizes.topk(most).indices.sort().values
    rows, columns = torch.tril_indices(len(subset), len(subset))
    inner = [gram[subset][:, subset][rows, columns] for gram in grams.values()]
    return {
        "places": evidence.places[subset].tolist(),
        "parameters": list(grams),
        "inner": pack(torch.stack(inner, 1)),  # [P (P + 1) / 2, L], row i from (i, 0) to (i, i)
        "gradients": pack(_select_weights(evidence.whole, followed)[subset]),  # [P, M]
    }


def choose_weights(evidence: Evidence) -> dict[str, Tensor]:
    """Choose the weights to show: their places in each flattened parameter."""
    if not evidence.whole:
        return {}
    num = max(4, NUM_WEIGHTS // len(evidence.whole))
    return {
        name: _sum_sizes(g).topk(min(num, g[0].numel())).indices.cpu()
        for name, g in evidence.whole.items()
    }


def describe_weights(evidence: Evidence, followed: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Describe the chosen weights: their places, and their value after each stage."""
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
            {"name": name, "places": _unravel(places, evidence.whole[name].shape[1:])}
            for name, places in followed.items()
        ],
        **{
            stage: pack(
                torch.cat([narrow(t[name].flatten().cpu()[p]) for name, p in followed.items()])
            )
            for stage, t in stages.items()
            if t
        },
    }


def _sum_sizes(g: Tensor) -> Tensor:
    """Compute sum_i |g_i| of each weight."""
    sizes: Tensor = torch.linalg.vector_norm(g.reshape(len(g), -1), ord=1, dim=0)
    return sizes


def _unravel(places: Tensor, shape: torch.Size) -> list[list[int]]:
    """Convert flat places to one index per dimension."""
    return torch.stack(torch.unravel_index(places, shape), 1).tolist() if shape else [[]]


def _select_weights(whole: Mapping[str, Tensor], followed: Mapping[str, Tensor]) -> Tensor:
    """Select each example's gradient at the chosen weights: [P, M]."""
    flat = {name: g.reshape(len(g), -1) for name, g in whole.items()}
    columns = [flat[name][:, places.to(flat[name].device)] for name, places in followed.items()]
    return narrow(torch.cat(columns, 1).cpu())
