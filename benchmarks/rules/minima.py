"""Runs that escape from a local minimum whose place is known.

    v_i(w) = (w^2 - 1)^2 / 4 + (a + s x_i) w,    mean x = 0, mean x^2 = 1

The mean over all examples is (w^2 - 1)^2 / 4 + a w. With the penalty (c/2) w^2 its derivative is
w^3 - (1 - c) w + a, whose roots are known (Viete 1615): where a < 2 ((1 - c) / 3)^1.5 there are
three, the global minimum below 0, a barrier and a local minimum above it; else one, below 0.

The model holds many w, each with noise x of its own: they share no arithmetic, so each is a run.
"""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import anybatch as ab
from rules.common import round_figures

__all__ = [
    "BATCHES",
    "OPTIMISERS",
    "PENALTIES",
    "STARTS",
    "find_roots",
    "list_jobs",
    "predict_escapes",
    "run_job",
]

TILT, NOISE = 0.2, 1.0  # a, s
NUM_EXAMPLES, NUM_RUNS, NUM_UPDATES = 256, 400, 1500
BATCHES = (1, 16, NUM_EXAMPLES)
PENALTIES = (0.0, 0.3, 0.5)  # c
STARTS = ("local minimum", "near 0", "uniform")
OPTIMISERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "RMSProp": (torch.optim.RMSprop, {"lr": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
}


def find_roots(penalty: float) -> list[float]:
    """Return the roots of the derivative, ascending: minimum, barrier, local minimum; or one."""
    stiff = 1 - penalty
    size, cosine = 2 * math.sqrt(stiff / 3), -1.5 * TILT / stiff * math.sqrt(3 / stiff)
    if abs(cosine) <= 1:
        angle = math.acos(cosine) / 3
        return sorted(size * math.cos(angle - turn * 2 * math.pi / 3) for turn in range(3))
    return [-size * math.cosh(math.acosh(-cosine) / 3)]


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List each optimiser from each start, at each batch size, with each penalty."""
    cells = product(BATCHES, PENALTIES, STARTS, OPTIMISERS)
    return [
        {"size": size, "penalty": penalty, "start": start, "optimiser": optimiser}
        for size, penalty, start, optimiser in cells
    ]


def run_job(size: int, penalty: float, start: str, optimiser: str) -> dict[str, Any]:
    """Return the fraction of runs that end below 0, on the side of the global minimum."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_EXAMPLES, NUM_RUNS, generator=generator)
    noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
    model = Wells(draw_starts(start, generator))
    make, args = OPTIMISERS[optimiser]
    order = ab.Order(NUM_EXAMPLES, batch_size=size, seed=0)
    for step in ab.steps(
        model,
        ab.Objective(example_losses, penalty=ab.L2(penalty)),
        make(model.parameters(), **args),
        noise,
        order=order,
        epochs=-(-NUM_UPDATES * size // NUM_EXAMPLES),
    ):
        if step.step + 1 == NUM_UPDATES:
            break
    below = float((model.place < 0).float().mean())
    return {
        "below": round_figures(below),
        "mean": round_figures(float(model.place.detach().mean())),
    }


def draw_starts(start: str, generator: torch.Generator) -> Tensor:
    """Draw the start of each run [NUM_RUNS]."""
    if start == "uniform":
        return torch.rand(NUM_RUNS, generator=generator) * 4 - 2
    centre, width = (find_roots(0.0)[-1], 0.0) if start == "local minimum" else (0.0, 0.1)
    return centre + width * torch.randn(NUM_RUNS, generator=generator)


def predict_escapes(start: str, penalty: float) -> float:
    """Return the fraction of runs that plain descent takes below 0: those that start there."""
    places = find_roots(penalty)
    if len(places) == 1:
        return 1.0
    barrier = places[1]
    if start == "uniform":
        return (barrier + 2) / 4
    if start == "near 0":
        return (1 + math.erf(barrier / 0.1 / math.sqrt(2))) / 2
    return float(find_roots(0.0)[-1] < barrier)


class Wells(nn.Module):
    """Many independent w."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.place = nn.Parameter(start.clone())

    def forward(self, noise: Tensor) -> Tensor:
        """Return v_i of each w [B, runs]."""
        return (self.place**2 - 1) ** 2 / 4 + (TILT + NOISE * noise) * self.place


def example_losses(model: nn.Module, noise: Tensor) -> Tensor:
    """Return the sum over the runs [B], so that each w gets its own gradient."""
    return torch.as_tensor(model(noise)).sum(1)
