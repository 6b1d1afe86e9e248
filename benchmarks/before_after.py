"""Compare the seconds of an update in two versions of the library: is the later one slower?

Each round starts a process of each version (A B A B ...). It times a hand-written PyTorch step and
the library's step, uncut, cut in four, and observed, and reports the ratio of each to the
hand-written one. The result is the ratio of these ratios, later over earlier, as a median over the
rounds.

    git worktree add /tmp/before REVISION
    python benchmarks/before_after.py /tmp/before [--write]

With `--benchmark` it runs a benchmark of each version in turns instead, and compares the ratios
that both report: `loop` (to the loop by hand), `observed_step` (to the unobserved step).

    python benchmarks/before_after.py /tmp/before --benchmark loop observed_step [--write]

Earlier versions chose their kernels by measurement. ANYBATCH_KERNELS=fastest, for the later version
alone, compares with them; its result has a name of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tables import format_ratio, format_table

HERE = Path(__file__).parents[1]
WORDS = {
    "loop": ["--rounds", "20", "--threads", "1"],
    "observed_step": ["--seconds", "12", "--threads", "1"],
}
WAYS = {
    "unobserved": "unobserved",
    "observed": "norms",
    "noise": "with noise scale",
    "alignment": "alignment",
    "alignment in 4": "alignment in 4",
    "clipped": "clipped",
}
Ratios = dict[str, dict[str, float]]
Result = dict[str, Any]


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


def make_environment(tree: Path) -> dict[str, str]:
    """Return the variables for a process of a version."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    if tree != HERE:
        environment.pop("ANYBATCH_KERNELS", None)
    return environment


def measure_tree(tree: Path, budget: float) -> dict[str, dict[str, float]]:
    """Return the ratios of the version in a folder, from a separate process."""
    command = [sys.executable, __file__, "--measure", str(budget)]
    ended = subprocess.run(
        command, env=make_environment(tree), capture_output=True, text=True, check=True
    )
    results: dict[str, dict[str, float]] = json.loads(ended.stdout.splitlines()[-1])
    return results


def pick_ratios(name: str, cases: dict[str, Any]) -> Ratios:
    """Return the ratios that a benchmark reports, by case and way."""
    if name == "loop":
        return {case: {"steps over by hand": result["ratio"]} for case, result in cases.items()}
    return {
        case: {
            f"{way} over {base}": ratio
            for base in ("unobserved", "plain")
            for way, ratio in result[f"over_{base}"].items()
            if way != base and "whole" not in way
        }
        for case, result in cases.items()
    }


def run_benchmark(tree: Path, name: str, words: list[str]) -> Ratios:
    """Run the benchmark of a version, and put its committed result and page back."""
    file = tree / "benchmarks" / "results" / f"{name}.json"
    committed = {each: each.read_bytes() for each in (file, tree / "docs" / "performance.md")}
    command = [sys.executable, str(tree / "benchmarks" / f"{name}.py"), "--write", *words]
    try:
        subprocess.run(command, env=make_environment(tree), stdout=subprocess.DEVNULL, check=True)
        return pick_ratios(name, json.loads(file.read_text())["cases"])
    finally:
        for each, content in committed.items():
            each.write_bytes(content)


def compare(before: Callable[[], Ratios], after: Callable[[], Ratios], rounds: int) -> Result:
    """Run both in turns; return each round, and the medians of later over earlier."""
    pairs = [(before(), after()) for _ in range(rounds)]
    ratios = {
        name: {
            way: median(b[name][way] / a[name][way] for a, b in pairs)
            for way in ways
            if way in pairs[0][1][name]
        }
        for name, ways in pairs[0][0].items()
    }
    for name, each in ratios.items():
        print(name, ", ".join(f"{way} {ratio:.3f}" for way, ratio in each.items()), flush=True)
    return {"later_over_earlier": ratios, "rounds": pairs}


def format_tables(steps: Result, loop: Result, fastest: Result, observed: Result) -> dict[str, str]:
    """Format the tables of docs/performance.md."""
    rows = []
    for name, ratios in steps["later_over_earlier"].items():
        loops = [each["later_over_earlier"].get(name, {}).values() for each in (loop, fastest)]
        rows.append(
            [name, *(format_ratio(ratio) for way in (ratios.values(), *loops) for ratio in way)]
        )
    head = ("network", "uncut", "cut in four", "observed", "`ab.steps`")
    observed_rows = [
        [name, *(format_ratio(ratios[f"{way} over plain"]) for way in WAYS)]
        for name, ratios in observed["later_over_earlier"].items()
    ]
    return {
        "before-after": format_table((*head, "`ab.steps`, fastest kernels"), rows),
        "before-after-observed": format_table(("network", *WAYS.values()), observed_rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the earlier version")
    parser.add_argument("--write", action="store_true", help="write the raw result and the tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each figure")
    parser.add_argument("--benchmark", nargs="*", choices=tuple(WORDS), help="run these in turns")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    names = args.benchmark or ["before_after"]
    for name in names:
        run = partial(run_benchmark, name=name, words=WORDS.get(name, []))
        if name == "before_after":
            run = partial(measure_tree, budget=args.budget)
        result = compare(partial(run, args.before), partial(run, HERE), args.rounds)
        if args.write:
            from performance import write_result

            kernels = os.environ.get("ANYBATCH_KERNELS")
            file = name if name == "before_after" else f"before_after_{name}"
            print(write_result(file if kernels is None else f"{file}_{kernels}", result))


if __name__ == "__main__":
    main()
