"""Norms of the weights under Sum and Mean at one rate, and under Sum at the converted rate."""

from collections.abc import Mapping
from typing import Any

import torch

import anybatch as ab
from anybatch.zoo import cross_entropy
from rules.common import FULL, SEEDS, build_network, load_examples, round_figures, weight_norm

__all__ = ["LR", "NUM_UPDATES", "REDUCTIONS", "SIZES", "list_jobs", "run_job"]

SIZES, LR, NUM_UPDATES, LOOK_EVERY = (16, 64, 256), 0.0005, 1000, 50
REDUCTIONS = ("mean", "sum", "sum at lr / B")


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List each reduction at each size."""
    return [
        {"reduction": reduction, "size": size, "seed": seed}
        for reduction in REDUCTIONS
        for size in SIZES
        for seed in SEEDS
    ]


def run_job(reduction: str, size: int, seed: int) -> dict[str, Any]:
    """Record |w| before the first update and after every 50th."""
    model = build_network(seed)
    lr = LR / size if reduction == "sum at lr / B" else LR
    kind = ab.Mean() if reduction == "mean" else ab.Sum()
    norms = [round_figures(weight_norm(model))]
    for step in ab.steps(
        model,
        ab.Objective(cross_entropy, reduction=kind),
        torch.optim.SGD(model.parameters(), lr=lr),
        load_examples("train"),
        order=ab.Order(FULL, batch_size=size, seed=seed, last="carry"),
        epochs=NUM_UPDATES * size // FULL + 1,
    ):
        if (step.step + 1) % LOOK_EVERY == 0:
            norms.append(round_figures(weight_norm(model)))
        if step.step + 1 == NUM_UPDATES:
            break
    return {"every": LOOK_EVERY, "norms": norms}
