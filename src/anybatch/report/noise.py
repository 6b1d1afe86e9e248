"""Noise of the gradient over training, and what another batch size would change.

    B_noise = tr(S) / |G|^2,    noise of a batch of B: its gradient is off by |G| sqrt(B_noise / B)
    S / S_min = 1 + B_noise / B,    E / E_min = 1 + B / B_noise

S steps and E examples to a given loss, against the fewest that any batch size needs. Both are
predictions: of a model in which noise is the same everywhere and the step is small. With the ends
of the interval of B_noise they have ends of their own.

Source: McCandlish et al. 2018, 1812.06162, section 2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anybatch.ledger.noise import NoiseEstimate, NoiseScale, noise_estimate
from anybatch.reductions import Reduction
from anybatch.report.evidence import Evidence

__all__ = ["NEEDED", "noise", "noise_over_training"]

NEEDED = ("norm", "alignment", "count")  # columns of the ledger
WINDOWS = 40  # of training, at most
TIMES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # the batch


def noise(
    evidence: Evidence, over_training: Sequence[Mapping[str, Any]], why: str
) -> dict[str, Any]:
    """Gather the noise scale of a batch, and what follows from it.

    Args:
        over_training: from `noise_over_training`, or alike.
        why: there is none, where there is none.
    """
    found: dict[str, Any] = {"over_training": list(over_training), "why_not_over_training": why}
    scale = evidence.ledger.noise_scale
    if scale is None:
        return found | {"why": _why(evidence)}
    size = evidence.gradient.num_examples
    return found | {
        "scale": asdict(scale),
        "size": size,
        "buys": [_bought(scale, max(1, round(times * size))) for times in TIMES],
    }


def noise_over_training(
    columns: Mapping[str, NDArray[Any]], reduction: Reduction
) -> list[dict[str, Any]]:
    """Estimate noise scales from the ledger of a run, each from some consecutive steps.

    Args:
        columns: of the ledger, with norm, alignment and count.
        reduction: linear in the values.
    """
    step = columns["step"]
    begins = np.flatnonzero(np.diff(step, prepend=-1))
    bounds = [*begins.tolist(), len(step)]
    estimates = []
    for a, b in pairwise(bounds):
        if b - a > 1 and np.all(columns["count"][a:b] > 0):
            own = {name: torch.from_numpy(columns[name][a:b].copy()) for name in NEEDED}
            estimates.append((int(step[a]), _estimate(own, reduction)))
    size = -(-len(estimates) // WINDOWS)
    windows = [estimates[i : i + size] for i in range(0, len(estimates), max(size, 1))]
    return [_window(window) for window in windows]


def _estimate(own: Mapping[str, torch.Tensor], reduction: Reduction) -> NoiseEstimate:
    """Estimate the noise of one batch: G = f sum n_i g_i and g = G / (f N), f the factor."""
    counts = own["count"].double()
    total = float(counts.sum())
    factor = reduction.factor(total, len(counts))
    assert factor is not None
    inner = own["alignment"].double() / (factor * total)  # <g_i, g>
    square = float((counts / total * inner).sum())  # |g|^2
    return noise_estimate(own["norm"].double() ** 2, inner, counts, square)


def _window(estimates: Sequence[tuple[int, NoiseEstimate]]) -> dict[str, Any]:
    scale = _added(estimate for _, estimate in estimates).scale()
    return {"first": estimates[0][0], "last": estimates[-1][0]} | asdict(scale)


def _added(estimates: Iterable[NoiseEstimate]) -> NoiseEstimate:
    first, *others = estimates
    for estimate in others:
        first = first + estimate
    return first


def _bought(scale: NoiseScale, size: int) -> dict[str, Any]:
    """Predict for another batch size how far the gradient is off, and what training needs."""
    found: dict[str, Any] = {"size": size}
    for name, b in (("value", scale.value), ("low", scale.low), ("high", scale.high)):
        found[name] = {
            "off": (b / size) ** 0.5,
            "steps": 1 + b / size,
            "examples": 1 + size / b if b else float("inf"),
        }
    return found


def _why(evidence: Evidence) -> str:
    if evidence.unseen is not None:
        return evidence.unseen
    if evidence.objective is None:
        return "noise_scale was not among what was observed: Observe(noise_scale=True)."
    return (
        "the noise scale is that of a mean of examples: of two or more, under one term with Mean "
        "or Sum, and not clipped one by one."
    )
