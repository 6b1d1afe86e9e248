"""Compare compiled updates with plain ones and with a hand-written PyTorch loop.

All three train the same network on the same data by SGD with momentum, in turns (A B C A B C) in
one process, and each round gives ratios. `ab.steps` writes its records. The hand-written loop
records nothing. The seconds of compiling are those of an empty cache, the check included.

    python benchmarks/compiled.py [--write]
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.runs.records import read_records
from anybatch.zoo import gpt, lenet, mlp, softmax_regression
from loop import time_step
from performance import write_result
from tables import format_seconds, format_table

HEAD = ("network", "by hand", "`ab.steps`", "compiled", "over by hand", "over `ab.steps`")
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network and its data."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    batch: int
    chunk: int  # steps of a turn
    vocabulary: int | None = None  # if the inputs are tokens

    def make_data(self) -> Data:
        """Draw examples."""
        if self.vocabulary is None:
            return torch.rand(self.inputs), torch.randint(10, self.inputs[:1])
        tokens = torch.randint(self.vocabulary, self.inputs)
        return tokens, tokens.roll(-1, 1)


CASES = {
    "softmax regression 784-10, B=64": Case(
        lambda: softmax_regression([784]), (6400, 784), batch=64, chunk=200
    ),
    "784-128-10, B=64": Case(lambda: mlp([784], [128]), (6400, 784), batch=64, chunk=100),
    "GPT d=64, 2 layers, T=32, B=16": Case(gpt, (1600, 32), batch=16, chunk=20, vocabulary=256),
    "LeNet 8x8, B=64": Case(lambda: lenet(8), (6400, 1, 8, 8), batch=64, chunk=30),
    "LeNet 28x28, B=64": Case(lambda: lenet(28), (1280, 1, 28, 28), batch=64, chunk=10),
}


def compute_losses(model: nn.Module, batch: Data) -> ab.ExampleLosses:
    """Compute cross-entropy, summed over the tokens of an example if there are any."""
    outputs, targets = model(batch[0]), batch[1]
    if targets.ndim == 1:
        return ab.ExampleLosses(F.cross_entropy(outputs, targets, reduction="none"))
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    return ab.ExampleLosses(losses.sum(1), counts=torch.full((len(targets),), targets.shape[1]))


def loop_by_hand(case: Case, data: Data) -> Iterator[None]:
    """Train by the usual PyTorch loop."""
    model = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    while True:
        for ids in torch.randperm(len(data[0])).split(case.batch):
            loss = F.cross_entropy(model(data[0][ids]).flatten(0, -2), data[1][ids].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def loop_by_steps(case: Case, data: Data, folder: Path, *, compile: bool) -> Iterator[ab.Step]:
    """Train by `ab.steps`."""
    model = case.make()
    return ab.steps(
        model,
        ab.Objective(compute_losses),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        data,
        order=ab.Order(len(data[0]), batch_size=case.batch, seed=0),
        epochs=10**6,
        run=ab.Run(folder, checkpoint_every=10**9),
        compile=compile,
        self_check=False,  # the first compiled update is checked all the same
    )


def compare(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """Time all three in each round, after one round to warm up."""
    torch.manual_seed(0)
    data = case.make_data()
    plain = loop_by_steps(case, data, folder / "plain", compile=False)
    compiled = loop_by_steps(case, data, folder / "compiled", compile=True)
    loops: tuple[Iterator[Any], ...] = (loop_by_hand(case, data), plain, compiled)
    turns = [[time_step(loop, case.chunk) for loop in loops] for _ in range(rounds + 1)][1:]
    plain.close()
    compiled.close()
    rows = read_records(folder / "compiled/records.jsonl")
    (row,) = (row for row in rows if row["kind"] == "compile")
    names = ("by_hand_microseconds", "steps_microseconds", "compiled_microseconds")
    times = {name: median(turn[i] for turn in turns) * 1e6 for i, name in enumerate(names)}
    return {
        **times,
        "over_by_hand": median(turn[2] / turn[0] for turn in turns),
        "over_steps": median(turn[2] / turn[1] for turn in turns),
        "compiling_seconds": row["seconds"]["compiling"],
        "turns_microseconds": [[round(t * 1e6, 1) for t in turn] for turn in turns],
    }


def format_tables(compiled: dict[str, Any]) -> dict[str, str]:
    """Format the table of the document."""
    rows = []
    for name, result in compiled["cases"].items():
        times = [result[f"{loop}_microseconds"] for loop in ("by_hand", "steps", "compiled")]
        ratios = [f"{result[ratio]:.2f}" for ratio in ("over_by_hand", "over_steps")]
        columns = [format_seconds(time / 1e6) for time in times]
        rows.append([name, *columns, *ratios, f"{result['compiling_seconds']:.0f} s"])
    return {"compiled": format_table([*HEAD, "compiling"], rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        for name, case in CASES.items():
            results[name] = compare(case, args.rounds, Path(folder) / str(len(results)))
            table = format_tables({"cases": {name: results[name]}})["compiled"]
            print(table.splitlines()[-1], flush=True)
    if args.write:
        print(write_result("compiled", {"cases": results}))


if __name__ == "__main__":
    main()
