"""Compare the seconds of an update in two versions of the library: is the later one slower?

Each round starts a process of each version (A B A B ...). It times a hand-written PyTorch step and
the library's step, uncut, cut in four, and observed, and reports the ratio of each to the
hand-written one. The result is the ratio of these ratios, later over earlier, as a median over the
rounds.

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


def build_cases() -> dict[str, tuple[nn.Module, tuple[Tensor, Tensor], Any]]:
    """Return model, batch and example losses by name."""
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


def time_step(step: Callable[[], object], budget: float) -> float:
    """Return the least time of a step within some seconds, since other work only adds time.

    The ledger checks each of the first 16 steps, so these are left out.
    """
    for _ in range(20):
        step()
    times, until = [], time.perf_counter() + budget
    while time.perf_counter() < until or len(times) < 5:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(budget: float) -> dict[str, dict[str, float]]:
    """Return ratios to the step by hand, by case and way."""
    import anybatch as ab

    torch.set_num_threads(1)
    results = {}
    for name, (model, batch, losses) in build_cases().items():
        objective = ab.Objective(losses)

        def step_by_hand(
            model: nn.Module = model, batch: Any = batch, losses: Any = losses
        ) -> None:
            model.zero_grad()
            losses(model, batch).mean().backward()

        def step(
            model: nn.Module = model, batch: Any = batch, objective: Any = objective, **how: Any
        ) -> None:
            ab.batch_gradient(model, objective, batch, **how)

        quarter = ab.Layout(len(batch[1]) // 4)
        ways: dict[str, Callable[[], object]] = {
            "uncut": step,
            "cut in four": lambda step=step, quarter=quarter: step(layout=quarter),
            "observed": lambda step=step: step(observe=ab.Observe()),
        }
        hand = time_step(step_by_hand, budget)
        results[name] = {way: time_step(step, budget) / hand for way, step in ways.items()}
    return results


def measure_tree(tree: Path, budget: float) -> dict[str, dict[str, float]]:
    """Return the ratios of the version in a folder, from a separate process."""
    command = [sys.executable, __file__, "--measure", str(budget)]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    results: dict[str, dict[str, float]] = json.loads(ended.stdout.splitlines()[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the earlier version")
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each figure")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    rounds = [
        (measure_tree(args.before, args.budget), measure_tree(HERE, args.budget))
        for _ in range(args.rounds)
    ]
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
