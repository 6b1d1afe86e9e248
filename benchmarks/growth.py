"""Measure how the time of an update grows: with batch, width, depth, micro-batches and ranks.

The network is 784-h-...-h-10 with ReLU. One number changes at a time, from `BASE`. Three ways to
leave the gradient of the mean loss in `.grad` are timed once a round, in turn (A B C A B C ...):

    by hand    PyTorch: zero_grad, and forward and backward for each micro-batch; on several ranks
               DistributedDataParallel
    gradient   anybatch.batch_gradient
    norms      the same, and every example's norm, in total and by parameter

The first updates, which the ledger confirms one by one, are left out. One thread on one core does
the update, and seconds are its CPU seconds, so that other work on the machine does not count. Only
the ranks may use all cores. They divide the batch, speak gloo over loopback, and their seconds are
wall time from one barrier to the next. A ratio is the median of the ratios in each round.

    python benchmarks/growth.py [--write]
"""

import argparse
import copy
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import anybatch as ab
from anybatch.training.launch import launch
from anybatch.zoo import mlp
from bitwise import time_steps
from compiled import compute_losses
from machine import use_one_core
from observed_step import NORMS, NUM_CONFIRMED
from performance import write_result
from svg import Axis, Series, find_ticks, plot
from tables import format_seconds, format_table

WAYS = {"by hand": "by hand", "gradient": "`batch_gradient`", "norms": "with norms"}
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Update:
    """An update whose time is measured."""

    batch: int = 256  # examples, over all ranks
    width: int = 128
    depth: int = 2  # hidden layers
    micro_batches: int = 1
    ranks: int = 1


BASE = Update()
AXES = {
    "batch": tuple(4**power for power in range(8)),
    "width": tuple(2**power for power in range(4, 12)),
    "depth": tuple(2**power for power in range(7)),
    "micro_batches": tuple(2**power for power in range(7)),
    "ranks": (1, 2, 4),
}
LABELS = {"batch": "batch size", "depth": "hidden layers", "micro_batches": "micro-batches"}


def build_ways(update: Update, group: Any = None) -> tuple[nn.Module, dict[str, Callable[[], Any]]]:
    """Build the model of the way by hand, and every way."""
    torch.manual_seed(0)
    model = mlp([784], [update.width] * update.depth)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.kaiming_normal_(p)  # torch's own start makes gradients vanish in deep networks
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    batch = torch.rand(update.batch, 784), torch.randint(10, (update.batch,))
    if group is not None:
        share = len(batch[0]) // update.ranks
        batch = batch[0].split(share)[group.rank()], batch[1].split(share)[group.rank()]
    size = -(-len(batch[0]) // update.micro_batches)
    pieces = list(zip(batch[0].split(size), batch[1].split(size), strict=True))
    forward = DistributedDataParallel(other, process_group=group) if update.ranks > 1 else other

    def compute_by_hand() -> None:
        forward.zero_grad()
        for inputs, targets in pieces:
            loss = F.cross_entropy(forward(inputs), targets)
            (loss / len(pieces) if len(pieces) > 1 else loss).backward()

    objective, layout = ab.Objective(compute_losses), ab.Layout(micro_batch=size)
    ours = partial(ab.batch_gradient, model, objective, batch, layout=layout, group=group)
    norms = partial(ours, observe=ab.Observe(**NORMS))
    return other, {"by hand": compute_by_hand, "gradient": ours, "norms": norms}


def compare_gradients(update: Update, group: Any = None) -> dict[str, float]:
    """Return the distance of each way's gradient from that by hand, over its norm."""
    other, ways = build_ways(update, group)
    ways["by hand"]()
    right = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])
    sums = {}
    for name in ("gradient", "norms"):
        ways[name]()
        model = ways[name].args[0]  # type: ignore[attr-defined]  # of a partial
        sums[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {name: float((each - right).norm() / right.norm()) for name, each in sums.items()}


def time_rank(update: Update, seconds: float, group: Any) -> bytes:
    """Return, pickled, the seconds of each way in each round, as a rank sees them."""
    torch.set_num_threads(1)
    distances = compare_gradients(update, group)
    assert max(distances.values()) < 1e-4, f"The gradients of {update} differ: {distances}."
    _, ways = build_ways(update, group)
    for way in ways.values():
        for _ in range(NUM_CONFIRMED):
            way()
    clock = time.process_time if group is None else time.perf_counter
    return pickle.dumps(time_steps(ways, group, seconds, clock))


def time_update(axis: str, value: int, seconds: float) -> dict[str, Any]:
    """Measure an update, with one number changed."""
    update = replace(BASE, **{axis: value})
    if axis == "ranks":
        work = partial(time_rank, update, 3 * seconds)  # shared cores make the times scatter
        outputs = launch(work, value, imports=["growth"])
    else:
        with use_one_core():
            outputs = [time_rank(update, seconds, None)]
    per_rank: list[Times] = [pickle.loads(output) for output in outputs]
    times = {
        way: [max(each) for each in zip(*(rank[way] for rank in per_rank), strict=True)]
        for way in WAYS
    }
    return {
        "value": value,
        "rounds": len(times["by hand"]),
        "seconds": {way: median(each) for way, each in times.items()},
        "over by hand": {
            way: median(a / b for a, b in zip(times[way], times["by hand"], strict=True))
            for way in WAYS
        },
    }


def format_tables(growth: dict[str, Any]) -> dict[str, str]:
    """Format the table of the document."""
    head = ("", "", *WAYS.values(), "over by hand", "norms over by hand")
    rows = []
    for axis, results in growth["axes"].items():
        for result in results:
            name = LABELS.get(axis, axis) if result is results[0] else ""
            times = [format_seconds(result["seconds"][way]) for way in WAYS]
            ratios = [f"{result['over by hand'][way]:.2f}" for way in ("gradient", "norms")]
            rows.append([name, f"{result['value']:,}", *times, *ratios])
    return {"growth": format_table(head, rows)}


def draw_plots(growth: dict[str, Any]) -> dict[str, str]:
    """Draw the time of each way over each number, as SVG."""
    plots = {}
    for axis, results in growth["axes"].items():
        lines = []
        for colour, (way, name) in enumerate(WAYS.items()):
            points = [(each["value"], 1e3 * each["seconds"][way]) for each in results]
            lines.append(Series(name.strip("`"), points, colour, marks=True))
        times = [time for line in lines for _, time in line.points]
        label = LABELS.get(axis, axis)
        plots[f"growth-{axis.replace('_', '-')}"] = plot(
            f"Milliseconds of an update over {label}",
            Axis(label, [result["value"] for result in results], is_log=True),
            Axis("milliseconds", find_ticks(min(times), max(times)), is_log=True),
            lines,
        )
    return plots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write raw result, table and plots")
    parser.add_argument("--seconds", type=float, default=4, help="for each update, or 5 rounds")
    args = parser.parse_args()
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, values in AXES.items():
        axes[axis] = []
        for value in values:
            axes[axis].append(time_update(axis, value, args.seconds))
            table = format_tables({"axes": {axis: axes[axis][-1:]}})["growth"]
            print(table.splitlines()[-1], flush=True)
    if args.write:
        result = {"cores of the ranks": len(os.sched_getaffinity(0)), "axes": axes}
        print(write_result("growth", result))


if __name__ == "__main__":
    main()
