"""Compare `ab.steps`, with records on, with a hand-written PyTorch loop: microseconds a step.

Three loops train the same network on the same data in turns (A B C A B C) in one process: by hand,
by `ab.steps`, and by `ab.steps` that observes norms for each example and parameter. The time of a
chunk is divided by its steps, and each turn gives the ratios. The hand-written loop indexes,
computes the mean loss, goes back and updates. It records nothing.

    python benchmarks/loop.py [--write]     # also the table of docs/performance.md
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
from performance import write_result
from tables import format_ratio, format_seconds, format_table

Data = tuple[Tensor, Tensor]
LOOPS = ("by_hand", "steps", "observed")
CASES: dict[str, dict[str, Any]] = {  # with the aims of `ratio` and `observed_over_steps`
    "784-128-10, B=64": {
        "make": lambda: mlp([784], [128]),
        "inputs": (6400, 784),
        "batch_size": 64,
        "chunk": 200,
        "aims": (1.10, 1.35),
    },
    "LeNet 28x28, B=128": {
        "make": lambda: lenet(28),
        "inputs": (1280, 1, 28, 28),
        "batch_size": 128,
        "chunk": 20,
        "aims": (1.05, 1.12),
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


def loop_by_steps(
    model: nn.Module, data: Data, batch_size: int, run: ab.Run, observe: ab.Observe | None = None
) -> Iterator[ab.Step]:
    """Train by `ab.steps`."""

    def losses(model: nn.Module, batch: Data) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = ab.Order(len(data[0]), batch_size=batch_size, seed=0)
    how: dict[str, Any] = {"order": order, "epochs": 10**6, "run": run, "observe": observe}
    return ab.steps(model, ab.Objective(losses), optimizer, data, **how)


def time_step(
    loop: Iterator[Any], num_steps: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the mean seconds of a step over a chunk."""
    start = clock()
    for _ in range(num_steps):
        next(loop)
    return (clock() - start) / num_steps


def compare(case: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Time all loops in each round, after one round to warm up."""
    torch.manual_seed(0)
    data = torch.rand(case["inputs"]), torch.randint(10, case["inputs"][:1])
    loops = [loop_by_hand(case["make"](), data, case["batch_size"])]
    for observe in (None, ab.Observe(parameter_norms=True)):
        run = ab.Run(folder / f"{len(loops)}", checkpoint_every=10**9)
        loops.append(loop_by_steps(case["make"](), data, case["batch_size"], run, observe))
    turns = [[time_step(loop, case["chunk"]) for loop in loops] for _ in range(rounds + 1)][1:]
    for loop in loops:
        loop.close()
    return {
        **{
            f"{name}_microseconds": median(turn[i] for turn in turns) * 1e6
            for i, name in enumerate(LOOPS)
        },
        "ratio": median(steps / hand for hand, steps, _ in turns),
        "observed_over_steps": median(observed / steps for _, steps, observed in turns),
        "turns_microseconds": [[round(t * 1e6, 1) for t in turn] for turn in turns],
    }


def name_row(case: str, threads: int) -> str:
    """Name a row of the table."""
    return case if threads == 1 else f"{case}, {threads} threads"


def format_tables(loop: dict[str, Any]) -> dict[str, str]:
    """Format the table of docs/performance.md."""
    rows = []
    for name, result in loop["cases"].items():
        aims = next(case["aims"] for prefix, case in CASES.items() if name.startswith(prefix))
        ratios = (result["ratio"], result["observed_over_steps"])
        cells = [format_seconds(result[f"{loop}_microseconds"] / 1e6) for loop in LOOPS]
        for ratio, aim in zip(ratios, aims, strict=True):
            cells += [format_ratio(ratio, aim), f"{aim:.2f}"]
        rows.append([name, *cells])
    head = ("network", "by hand", "`ab.steps`", "observed")
    ratio_head = ("`ab.steps` over by hand", "aim", "observed over `ab.steps`", "aim")
    return {"loop": format_table((*head, *ratio_head), rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            for threads in args.threads:
                torch.set_num_threads(threads)
                result = compare(case, args.rounds, Path(folder) / str(len(results)))
                results[name_row(name, threads)] = result
                table = format_tables({"cases": results})["loop"]
                print(*table.splitlines()[0 if len(results) == 1 else -1 :], sep="\n", flush=True)
    if args.write:
        print(write_result("loop", {"cases": results}))


if __name__ == "__main__":
    main()
