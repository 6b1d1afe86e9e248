"""Compare `ab.steps`, with records on, with a hand-written PyTorch loop: microseconds a step.

Both train the same network on the same data, A B A B in one process. The time of a chunk is divided
by its steps, and each pair gives a ratio. The hand-written loop indexes, computes the mean loss,
goes back and updates. It records nothing.

    python benchmarks/loop.py [--write]
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.zoo import lenet, mlp
from machine import write

Data = tuple[Tensor, Tensor]
CASES: dict[str, dict[str, Any]] = {
    "784-128-10, B=64": {
        "make": lambda: mlp([784], [128]),
        "inputs": (6400, 784),
        "batch_size": 64,
        "chunk": 200,
        "bound": 1.15,
    },
    "LeNet 28x28, B=128": {
        "make": lambda: lenet(28),
        "inputs": (1280, 1, 28, 28),
        "batch_size": 128,
        "chunk": 20,
        "bound": 1.05,
    },
}


def loop_by_hand(model: nn.Module, data: Data, batch_size: int) -> Iterator[None]:
    """Train by the usual PyTorch loop."""
    inputs, targets = data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        for ids in torch.randperm(len(inputs)).split(batch_size):
            loss = F.cross_entropy(model(inputs[ids]), targets[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def loop_by_steps(model: nn.Module, data: Data, batch_size: int, run: ab.Run) -> Iterator[ab.Step]:
    """Train by `ab.steps`."""

    def losses(model: nn.Module, batch: Data) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = ab.Order(len(data[0]), batch_size=batch_size, seed=0)
    return ab.steps(
        model, ab.Objective(losses), optimizer, data, order=order, epochs=10**6, run=run
    )


def time_step(
    loop: Iterator[Any], num_steps: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds of a step over a chunk."""
    start = clock()
    for _ in range(num_steps):
        next(loop)
    return (clock() - start) / num_steps


def compare(case: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Time both in each round, A B A B, after one round to warm up."""
    torch.manual_seed(0)
    data = torch.rand(case["inputs"]), torch.randint(10, case["inputs"][:1])
    run = ab.Run(folder, checkpoint_every=10**9)
    ours = loop_by_steps(case["make"](), data, case["batch_size"], run)
    hand = loop_by_hand(case["make"](), data, case["batch_size"])
    pairs = [
        (time_step(ours, case["chunk"]), time_step(hand, case["chunk"])) for _ in range(rounds + 1)
    ][1:]
    ours.close()
    return {
        "steps_microseconds": median(a for a, _ in pairs) * 1e6,
        "by_hand_microseconds": median(b for _, b in pairs) * 1e6,
        "ratio": median(a / b for a, b in pairs),
        "bound": case["bound"],
        "pairs_microseconds": [(round(a * 1e6, 1), round(b * 1e6, 1)) for a, b in pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            result = compare(case, args.rounds, Path(folder) / str(len(results)))
            results[name] = result
            print(
                f"{name}: {result['steps_microseconds']:.0f} us a step, by hand "
                f"{result['by_hand_microseconds']:.0f} us; ratio {result['ratio']:.3f}, "
                f"to reach {result['bound']}"
            )
    if args.write:
        print(write("loop", {"cases": results}))


if __name__ == "__main__":
    main()
