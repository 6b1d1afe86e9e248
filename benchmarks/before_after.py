"""Seconds of an update by two versions of the library, in turn: is the later one slower?

Each round starts a process of either version (A B A B ...), which times a hand-written PyTorch step
and the library's, uncut, cut in four, and observed, and reports the ratio of each to that by hand.
The result is the ratio of these ratios, later over earlier, as a median over the rounds.

    git worktree add /tmp/before REVISION
    python benchmarks/before_after.py /tmp/before [--write]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parents[1]


def cases() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], Any]]:
    """Model, batch and example losses by name."""
    from anybatch.zoo import gpt, lenet, mlp

    def classes(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def tokens(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)

    torch.manual_seed(0)
    labels, ids = torch.randint(10, (128,)), torch.randint(256, (16, 64))
    return {
        "784-128-10, B=64": (mlp([784], [128]), (torch.rand(64, 784), labels[:64]), classes),
        "LeNet 28x28, B=128": (lenet(28), (torch.rand(128, 1, 28, 28), labels), classes),
        "GPT d=128, T=64, B=16": (gpt(256, 128, 2, 4, 64), (ids, ids), tokens),
    }


def seconds(step: Callable[[], object], budget: float) -> float:
    """Least time of as many steps as fit into some seconds: the machine has other work.

    The ledger confirms each of the first 16 steps, so these are left out.
    """
    for _ in range(20):
        step()
    found, until = [], time.perf_counter() + budget
    while time.perf_counter() < until or len(found) < 5:
        begun = time.perf_counter()
        step()
        found.append(time.perf_counter() - begun)
    return min(found)


def measure(budget: float) -> dict[str, dict[str, float]]:
    """Ratios to the step by hand, by case and way."""
    import anybatch as ab

    torch.set_num_threads(1)
    found = {}
    for name, (model, batch, losses) in cases().items():
        objective = ab.Objective(losses)

        def by_hand(model: nn.Module = model, batch: Any = batch, losses: Any = losses) -> None:
            model.zero_grad()
            losses(model, batch).mean().backward()

        def ours(
            model: nn.Module = model, batch: Any = batch, objective: Any = objective, **how: Any
        ) -> None:
            ab.batch_gradient(model, objective, batch, **how)

        quarter = ab.Layout(len(batch[1]) // 4)
        ways: dict[str, Callable[[], object]] = {
            "uncut": ours,
            "cut in four": lambda ours=ours, quarter=quarter: ours(layout=quarter),
            "observed": lambda ours=ours: ours(observe=ab.Observe()),
        }
        hand = seconds(by_hand, budget)
        found[name] = {way: seconds(step, budget) / hand for way, step in ways.items()}
    return found


def run(tree: Path, budget: float) -> dict[str, dict[str, float]]:
    """Ratios by the version in a folder, in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(budget)]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the earlier version")
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each figure")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    rounds = [(run(args.before, args.budget), run(HERE, args.budget)) for _ in range(args.rounds)]
    ratios = {
        name: {way: median(b[name][way] / a[name][way] for a, b in rounds) for way in ways}
        for name, ways in rounds[0][0].items()
    }
    for name, ways in ratios.items():
        print(name, ", ".join(f"{way} {ratio:.3f}" for way, ratio in ways.items()))
    if args.write:
        from machine import write

        print(write("before_after", {"later_over_earlier": ratios, "rounds": rounds}))


if __name__ == "__main__":
    main()
