"""Count the corrupted rows that a watch for spikes names in real text, and measure its overhead.

The text is the King James Bible, cut into windows of 64 letters. 8,000 windows are drawn by a seed.
Five of them are corrupted: two become random letters, one repeats a letter, one repeats a short
word, and one is read from its end. A small GPT predicts each next letter, for two epochs. Which of
the five does the watch name, and how many other rows? The control is the same text without the
corruption.

The overhead is that of the same steps without the watch, in turns, A B A B in one process. It is
processor time, which other programs on the machine change less than the time of the clock.

    python benchmarks/spikes.py [--write]     # also the tables of docs/spikes.md
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.data import load_verses
from anybatch.zoo import cross_entropy, gpt, mlp, token_cross_entropy
from machine import RESULTS, write
from tables import format_table, update_document

DOCUMENT = Path(__file__).parents[1] / "docs" / "spikes.md"
ROWS, LENGTH, BATCH, EPOCHS, SEEDS = 8000, 64, 32, 2, 5
KINDS = ("random letters", "random letters", "one letter", "one word", "backwards")
PAIRS = 9
STEPS = {"MLP": 300, "GPT": 40}  # of the overhead


def load_windows(seed: int) -> tuple[Tensor, int]:
    """Draw windows of the text; return them [ROWS, LENGTH + 1] and the number of letters."""
    verses = load_verses(unit="characters")
    tokens = verses.values.long()
    num_windows = (len(tokens) - 1) // LENGTH
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(num_windows, generator=generator)[:ROWS] * LENGTH
    windows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
    return windows, int(tokens.max()) + 1


def corrupt(windows: Tensor, num_letters: int, seed: int) -> tuple[Tensor, dict[int, str]]:
    """Return a copy with five corrupted rows, and the kind of each by its id."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randperm(len(windows), generator=generator)[: len(KINDS)].tolist()
    changed = windows.clone()
    for i, kind in zip(ids, KINDS, strict=True):
        row = torch.randint(num_letters, (LENGTH + 1,), generator=generator)
        if kind == "one letter":
            row = row[:1].expand(LENGTH + 1)
        if kind == "one word":
            row = row[:4].repeat(LENGTH)[: LENGTH + 1]
        if kind == "backwards":
            row = changed[i].flip(0)
        changed[i] = row
    return changed, dict(zip(ids, KINDS, strict=True))


def build(num_letters: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a small GPT and its optimiser."""
    torch.manual_seed(seed)
    model = gpt(vocabulary=num_letters, width=64, depth=2, length=LENGTH)
    return model, torch.optim.Adam(model.parameters(), lr=2e-3)


def train(windows: Tensor, num_letters: int, seed: int) -> list[ab.Step]:
    """Train with a watch; return the steps."""
    model, optimizer = build(num_letters, seed)
    return list(
        ab.steps(
            model,
            ab.Objective(token_cross_entropy),
            optimizer,
            (windows[:, :-1], windows[:, 1:]),
            order=ab.Order(len(windows), batch_size=BATCH, seed=seed),
            epochs=EPOCHS,
            schedule=ab.WarmUp(ab.Constant(2e-3), examples=50 * BATCH),
            spikes=ab.SpikeWatch(),
        )
    )


def list_names(steps: Sequence[ab.Step]) -> set[int]:
    """List the rows that the spikes of a training name."""
    spikes = [step.spike for step in steps if step.spike is not None]
    return {example.id for spike in spikes for example in spike.examples}


def count_names(seed: int) -> dict[str, Any]:
    """Count the corrupted rows that are named, and the others; and the names in clean text."""
    torch.set_num_threads(1)
    windows, num_letters = load_windows(seed)
    dirty, wrong = corrupt(windows, num_letters, seed)
    steps = train(dirty, num_letters, seed)
    names, clean = list_names(steps), list_names(train(windows, num_letters, seed))
    return {
        "seed": seed,
        "rows": ROWS,
        "updates": len(steps),
        "corrupted": {str(i): kind for i, kind in wrong.items()},
        "named": sorted(names & set(wrong)),
        "others": sorted(names - set(wrong)),
        "clean": sorted(clean),
        "spikes": {
            signal: sum(step.spike is not None and step.spike.signal == signal for step in steps)
            for signal in ("loss", "norm", "example")
        },
        "seconds": median(step.seconds for step in steps if step.spike is None),
        "spike_seconds": median(step.seconds for step in steps if step.spike is not None),
    }


def measure_overhead(name: str) -> dict[str, Any]:
    """Measure the time of the same steps with and without a watch that finds no spike."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    num_steps = STEPS[name]
    for _ in range(PAIRS):
        for way, spikes in (("without", None), ("with", ab.SpikeWatch(factor=1e9))):
            if name == "GPT":
                windows, num_letters = load_windows(0)
                model, optimizer = build(num_letters, 0)
                data, losses = (windows[:, :-1], windows[:, 1:]), token_cross_entropy
            else:
                torch.manual_seed(0)
                model, losses = mlp([784], [128]), cross_entropy
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                data = torch.rand(6400, 784), torch.arange(6400) % 10
            order = ab.Order(len(data[0]), batch_size=BATCH, seed=0)
            how = {"order": order, "steps": num_steps, "spikes": spikes}
            loop = ab.steps(model, ab.Objective(losses), optimizer, data, **how)
            next(loop)
            start = time.process_time()
            for _ in loop:
                pass
            seconds[way].append((time.process_time() - start) / (num_steps - 1))
    ratios = [b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    return {"model": name, "ratio": median(ratios), "seconds": seconds}


def format_names(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format how many rows are named, by seed and in all."""
    rows = [
        (
            *(f"{run['seed']}", f"{len(run['named'])} of {len(run['corrupted'])}"),
            *(f"{len(run['others'])} of {run['rows']}", f"{len(run['clean'])}"),
        )
        for run in runs
    ]
    totals = [sum(len(run[key]) for run in runs) for key in ("named", "corrupted", "others")]
    total = ("all", f"{totals[0]} of {totals[1]}", f"{totals[2]}")
    clean = f"{sum(len(run['clean']) for run in runs)}"
    head = ("seed", "corrupted rows named", "other rows named", "rows named in clean text")
    return format_table(head, [*rows, (*total, clean)])


def format_costs(runs: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> str:
    """Format the overhead of a step, and the time of a step with a spike."""
    rows = [
        (
            cost["model"],
            f"{1e3 * median(cost['seconds']['without']):.2f} ms",
            f"{100 * (cost['ratio'] - 1):+.1f} %",
        )
        for cost in costs
    ]
    times = median(run["spike_seconds"] / run["seconds"] for run in runs)
    last = ("GPT, a step with a spike", "", f"{times:.1f} times the step")
    return format_table(
        ("model", "step without the watch, processor time", "with it"), [*rows, last]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the page")
    parser.add_argument(
        "--overhead", action="store_true", help="measure the overhead alone, and keep the names"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    costs = [measure_overhead(name) for name in STEPS]
    if args.overhead:
        runs = json.loads((RESULTS / "spikes.json").read_text())["runs"]
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(count_names, range(SEEDS)))
    names, cost_table = format_names(runs), format_costs(runs, costs)
    print(names, cost_table, sep="\n\n")
    if args.write:
        write("spikes", {"runs": runs, "overhead": costs})
        update_document(DOCUMENT, {"names": names, "costs": cost_table}, {})


if __name__ == "__main__":
    main()
