"""Noise of the gradient over training, and the effect of another batch size.

    B_noise = tr(S) / |G|^2,    the gradient of a batch of B is off by |G| sqrt(B_noise / B)
    S / S_min = 1 + B_noise / B,    E / E_min = 1 + B / B_noise

S steps and E examples reach a given loss; S_min and E_min are the fewest at any batch size. Both
ratios are predictions of a model in which noise is the same everywhere and steps are small. They
have an interval, from that of B_noise.

Source: McCandlish et al. 2018, 1812.06162, section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.ledger.noise import NoiseEstimate, NoiseScale, noise_estimate
from anybatch.reductions import Reduction
from anybatch.report.evidence import Evidence

__all__ = ["NEEDED", "describe_noise", "estimate_noise_over_training"]

NEEDED = ("norm", "alignment", "count")  # columns of the ledger
MAX_WINDOWS = 40  # of training
TIMES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # the batch


def describe_noise(
    evidence: Evidence, over_training: Sequence[Mapping[str, Any]], why: str
) -> dict[str, Any]:
    """Describe the noise scale of a batch, and the effect of other batch sizes.

    Args:
        over_training: of `estimate_noise_over_training`, or in its form.
        why: reason if there is none.
    """
    figures: dict[str, Any] = {"over_training": list(over_training), "why_not_over_training": why}
    scale = evidence.ledger.noise_scale
    if scale is None:
        return figures | {"why": _explain_missing(evidence)}
    size = evidence.gradient.num_examples
    return figures | {
        "scale": asdict(scale),
        "size": size,
        "buys": [_predict(scale, max(1, round(times * size))) for times in TIMES],
    }


def estimate_noise_over_training(
    columns: Mapping[str, NDArray[Any]], reduction: Reduction
) -> list[dict[str, Any]]:
    """Estimate noise scales from the ledger of a run, one for each few consecutive steps.

    Args:
        columns: of the ledger, with norm, alignment and count.
        reduction: linear in the values.
    """
    step = columns["step"]
    bounds = [*np.flatnonzero(np.diff(step, prepend=-1)).tolist(), len(step)]
    estimates = []
    for a, b in pairwise(bounds):
        if b - a > 1 and np.all(columns["count"][a:b] > 0):
            rows = {name: torch.from_numpy(columns[name][a:b].copy()) for name in NEEDED}
            estimates.append((int(step[a]), _estimate_batch(rows, reduction)))
    size = -(-len(estimates) // MAX_WINDOWS)
    windows = [estimates[i : i + size] for i in range(0, len(estimates), max(size, 1))]
    return [_describe_window(window) for window in windows]


def _estimate_batch(rows: Mapping[str, torch.Tensor], reduction: Reduction) -> NoiseEstimate:
    """Estimate the noise of one batch: G = f sum n_i g_i and g = G / (f N), f the factor."""
    counts = rows["count"].double()
    total = float(counts.sum())
    factor = reduction.factor(total, len(counts))
    assert factor is not None
    inner = rows["alignment"].double() / (factor * total)  # <g_i, g>
    square = float((counts / total * inner).sum())  # |g|^2
    return noise_estimate(rows["norm"].double() ** 2, inner, counts, square)


def _describe_window(estimates: Sequence[tuple[int, NoiseEstimate]]) -> dict[str, Any]:
    scale = reduce(add, (estimate for _, estimate in estimates)).scale()
    return {"first": estimates[0][0], "last": estimates[-1][0]} | asdict(scale)


def _predict(scale: NoiseScale, size: int) -> dict[str, Any]:
    """Predict for another batch size how far the gradient is off, and what training needs."""
    figures: dict[str, Any] = {"size": size}
    for name, b in (("value", scale.value), ("low", scale.low), ("high", scale.high)):
        figures[name] = {
            "off": (b / size) ** 0.5,
            "steps": 1 + b / size,
            "examples": 1 + size / b if b else float("inf"),
        }
    return figures


def _explain_missing(evidence: Evidence) -> str:
    if evidence.unseen is not None:
        return evidence.unseen
    if evidence.objective is None:
        return "noise_scale was not among what was observed: Observe(noise_scale=True)."
    return (
        "the noise scale is that of a mean of examples: of two or more, under one term with Mean "
        "or Sum, and not clipped one by one."
    )
