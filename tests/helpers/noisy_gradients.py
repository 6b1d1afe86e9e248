"""Gradients of examples from a known population, and their noise scales."""

import math

import numpy as np
import torch

from anybatch.ledger.noise import noise_estimate


def figures(gradients, counts=None):
    """|g_i|^2, <g_i, g>, n_i and |g|^2 of a batch of gradients [B, d], or of N of them."""
    weights = np.ones(gradients.shape[:-1]) if counts is None else counts
    mean = (weights[..., None] * gradients).sum(-2) / weights.sum(-1)[..., None]
    inner = np.einsum("...bd,...d->...b", gradients, mean)
    return (gradients**2).sum(-1), inner, counts, (mean**2).sum(-1)


def estimates(gradients, counts=None, *, with_inner=True):
    """Estimate from each of N batches [N, B, d]."""
    squares, inner, _, square = figures(gradients, counts)
    return [
        noise_estimate(
            torch.from_numpy(squares[k]),
            torch.from_numpy(inner[k]) if with_inner else None,
            None if counts is None else torch.from_numpy(counts[k]),
            float(square[k]),
        )
        for k in range(len(gradients))
    ]


def gaussian(rng, trials, ratio, *, direction="all", tail=None, size=64):
    """Batches of gradients in 50 dimensions whose noise scale is `ratio`.

    S has the eigenvalues k^(-1/2): 36 directions' worth of noise. G has the same part in each of
    them, or lies along the noisiest. With a tail, the length of each example's noise is drawn too,
    so that gradients have Student's distribution with so many degrees of freedom.
    """
    eigenvalues = np.arange(1, 51) ** -0.5
    direction = np.full(50, 50**-0.5) if direction == "all" else np.eye(50)[0]
    noise_ = rng.standard_normal((trials, size, 50)) * np.sqrt(eigenvalues)
    if tail is not None:
        noise_ *= np.sqrt((tail - 2) / rng.chisquare(tail, (trials, size, 1)))
    return noise_ + direction * math.sqrt(eigenvalues.sum() / ratio)


def share(scales, truth):
    return np.mean([scale.low <= truth <= scale.high for scale in scales])
