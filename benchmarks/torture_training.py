"""Trainings that `torture_ranks.py` kills, and a way to kill one of their processes."""

import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch import distributed
from anybatch.runs.tensor_files import Output

__all__ = ["NUM_EVENTS", "RECIPE", "die_at", "train_as_rank"]

N, BATCH, EPOCHS = 96, 24, 25
NUM_EVENTS = 8000
"""Most of the ten thousand events of writing all checkpoints of a run; see `die_at`."""

RECIPE = [
    *("goyal-digits", "--set", "run.bitwise=true", "--set", "run.epochs=3"),
    *("--set", "run.checkpoint_every=2"),
]
"""Arguments of the command: batch normalisation in grains of 32, on real data."""


class Average:
    """Moving average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [p.detach().clone() for p in model.parameters()]

    def update(self, model: nn.Module) -> None:
        for weight, p in zip(self.weights, model.parameters(), strict=True):
            weight.mul_(0.9).add_(p.detach(), alpha=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = list(state["weights"])


def losses(model: nn.Module, batch: Any) -> ab.ExampleLosses:
    """Return losses of two groups."""
    inputs, targets, groups = batch
    return ab.ExampleLosses(F.cross_entropy(model(inputs), targets, reduction="none"), None, groups)


def add_noise(example: Any, key: Any) -> Any:
    """Augment an example with noise."""
    inputs, *rest = example
    return (inputs + 0.1 * torch.randn(inputs.shape, generator=key.generator()), *rest)


def build_columns(*, is_changed: bool) -> tuple[Tensor, ...]:
    """Return inputs, targets and groups."""
    inputs = torch.randn(N, 12, generator=torch.Generator().manual_seed(0))
    targets = inputs[:, :5].argmax(1)
    if is_changed:
        inputs[N // 2, 3] += 1e-3
    return inputs, targets, torch.arange(N) % 2


def train(folder: Path, group: Any, *, is_changed: bool = False) -> None:
    """Train with normalisation, dropout, two passes, clipping, momentum, a schedule, an average."""
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 5))
    )
    average = Average(model)
    objective = ab.Objective(losses, ab.GroupDRO(0.5), ab.L2(1e-3), grain=4)
    for _ in ab.steps(
        model,
        objective,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        build_columns(is_changed=is_changed),
        order=ab.Order(N, batch_size=BATCH, seed=7),
        epochs=EPOCHS,
        transform=add_noise,
        schedule=ab.WarmUp(ab.StepDecay(0.1, 0.5, every=400), examples=100),
        clip=ab.ClipNorm(1.0),
        state={"average": average},
        run=ab.Run(folder, checkpoint_every=3, group=group),
        group=group,
        bitwise=True,
    ):
        average.update(model)


def train_as_rank(
    folder: Path, rank: int, ranks: int, store: str, *, is_changed: bool = False
) -> None:
    """Train as one of several ranks."""
    torch.set_num_threads(1)
    if ranks == 1:
        train(folder, None, is_changed=is_changed)
        return
    with distributed.init_group(rank, ranks, store) as group:
        train(folder, group, is_changed=is_changed)


def die_at(event: int) -> None:
    """Kill this process at its event of this number; events write checkpoints."""
    events = count(1)

    def count_calls(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if next(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapper

    writes: list[tuple[Any, str]] = [
        *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "rmdir")),
        (Output, "write"),  # in the middle of a file
    ]
    for owner, name in writes:
        setattr(owner, name, count_calls(getattr(owner, name)))
