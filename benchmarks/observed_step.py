"""Measure the cost of observing every example's gradient: seconds a step, observed and not.

Every way to compute the step is timed once a round, in turn (A B A B ...). The first updates, which
the ledger confirms one by one, are left out. The result is the median
of the ratios in each round. Each step leaves the gradient of the mean loss in `.grad`:

    plain          PyTorch: forward, mean loss, backward
    channels_last  the same with channels last in memory, for images
    unobserved     anybatch.batch_gradient
    observed       with every example's norm, in total and by parameter
    fastest        the same with the kernels that are fastest here, over its own unobserved step
    noise          observed, and the noise scale
    alignment      norms and <grad m_i, G>, in one micro-batch and in four
    clipped        each example's gradient clipped to a norm

With --peers, other libraries (`observed_peers.py`) are timed instead, with the plain step, norms
and whole gradients of examples. Bytes are the peak of tensors within a step, by `PeakBytes`,
without parameters and inputs. A large part of a step can be the system's, which hands out memory
page by page. glibc keeps this memory with

    MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=2000000000

    python benchmarks/observed_step.py [--write] [--peers] [--only NAME ...] [--clock cpu]
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.gradient import batch_gradient
from anybatch.gradient.auto_micro_batch import PeakBytes
from anybatch.gradient.clip import ClipExamples
from anybatch.kernels import choice as kernels
from anybatch.layout import Layout
from anybatch.ledger.ledger import Observe
from anybatch.objective import Objective
from observed_models import AIMS, CASES, Case
from observed_peers import build_peers
from performance import write_result
from tables import format_ratio, format_table

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]
Clock = Callable[[], float]
NUM_CONFIRMED = 17  # more than the updates that the ledger confirms at first, which are left out
BASES = {"alignment in 4": "unobserved in 4", "fastest": "unobserved, fastest"}
PEERS = {
    "plain": "plain",
    "observed": "ours: norms",
    "Opacus ghost": "Opacus ghost",
    "BackPACK norms": "BackPACK norms",
    "whole": "ours: whole gradients",
    "Opacus hooks": "Opacus hooks",
    "BackPACK gradients": "BackPACK",
    "torch.func": "torch.func",
    "torch.compile": "torch.compile, plain",
}
NORMS = {"norms": True, "parameter_norms": True}


def build_plain(model: nn.Module, batch: Batch) -> Step:
    """Build the plain step: forward, mean loss, backward."""
    inputs, targets = batch

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()

    return step


def build_channels_last(case: Case, batch: Batch) -> Step:
    """Build the plain step of images with channels last."""
    to: dict[str, Any] = {"memory_format": torch.channels_last}
    return build_plain(case.make().to(**to), (batch[0].to(**to), batch[1]))


def build_ours(
    case: Case, model: nn.Module, batch: Batch, micro_batches: int = 1, **how: Any
) -> Step:
    """Build a step by `batch_gradient`."""
    objective = Objective(case.losses)
    layout = Layout(micro_batch=-(-len(batch[0]) // micro_batches))
    return lambda: batch_gradient(model, objective, batch, layout=layout, **how)


def use_fastest_kernels(step: Step) -> Step:
    """Build the same step with the kernels that are fastest here."""

    def step_fastest() -> None:
        way = kernels.get_way()
        kernels.use("fastest")
        step()
        kernels.use(way)

    return step_fastest


def build_steps(case: Case, model: nn.Module, batch: Batch) -> dict[str, Step]:
    """Build every step except those of other libraries, by name."""
    unobserved = build_ours(case, model, batch)
    observed = build_ours(case, model, batch, observe=Observe(**NORMS))
    aligned = Observe(norms=True, alignment=True)
    steps = {
        "plain": build_plain(model, batch),
        "unobserved": unobserved,
        "observed": observed,
        "unobserved, fastest": use_fastest_kernels(unobserved),
        "fastest": use_fastest_kernels(observed),
        "noise": build_ours(case, model, batch, observe=Observe(**NORMS, noise_scale=True)),
        "alignment": build_ours(case, model, batch, observe=aligned),
        "unobserved in 4": build_ours(case, model, batch, 4),
        "alignment in 4": build_ours(case, model, batch, 4, observe=aligned),
        "clipped": build_ours(case, model, batch, clip=ClipExamples(1.0)),
    }
    if batch[0].ndim == 4:
        steps["channels_last"] = build_channels_last(case, batch)
    return steps


def time_steps(steps: dict[str, Step], clock: Clock, seconds: float, least: int) -> dict[str, Any]:
    """Return the seconds of each step in each round, after one round to warm up."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    beginning, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - beginning < seconds:
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
        rounds += 1
    return times


def median_ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median ratio over the rounds."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def measure_peak(step: Step) -> int:
    """Return the peak bytes of the tensors of a step."""
    with PeakBytes() as memory:
        step()
    return int(memory.peak)


def compare(case: Case, clock: Clock, seconds: float) -> dict[str, Any]:
    """Measure all ways of this library for a model."""
    torch.manual_seed(0)
    model, batch = case.make(), case.batch()
    steps = build_steps(case, model, batch)
    for _ in range(NUM_CONFIRMED):
        steps["observed"]()
        steps["alignment in 4"]()
    times = time_steps(steps, clock, seconds, least=3)
    return {
        "rounds": len(times["plain"]),
        "milliseconds": {name: 1e3 * median(each) for name, each in times.items()},
        "over_plain": {name: median_ratio(times, name, "plain") for name in steps},
        "over_unobserved": {
            name: median_ratio(times, name, BASES.get(name, "unobserved")) for name in steps
        },
        "bytes": {name: measure_peak(steps[name]) for name in ("plain", "observed")},
    }


def compare_peers(case: Case, clock: Clock, seconds: float) -> dict[str, Any]:
    """Measure norms and whole gradients of this library and of others."""
    torch.manual_seed(0)
    model, batch = case.make(), case.batch()
    norms = {"plain": build_plain(model, batch)}
    norms["observed"] = build_ours(case, model, batch, observe=Observe(**NORMS))
    others, skipped = build_peers(model, batch)
    whole = build_ours(case, model, batch, observe=Observe(gradients=True))
    for _ in range(NUM_CONFIRMED):
        norms["observed"]()
    times = time_steps(norms, clock, seconds, least=3)
    # Apart from the others, since whole gradients move much memory.
    more = time_steps({"whole": whole, **others}, clock, 0.0, least=2)
    return {
        "rounds": len(times["plain"]),
        "milliseconds": {name: 1e3 * median(each) for name, each in (times | more).items()},
        "skipped": skipped,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print a line for each way."""
    print(f"{name}: {result['rounds']} rounds")
    for way, ms in result["milliseconds"].items():
        ratio = result.get("over_unobserved", {}).get(way)
        over = "" if ratio is None else f", {ratio:.3f} of {BASES.get(way, 'unobserved')}"
        print(f"  {way:28}{ms:10.2f} ms{over}")
    for peer, why in result.get("skipped", {}).items():
        print(f"  {peer}: left out, {why}")
    print(end="", flush=True)


def format_tables(steps: dict[str, Any], peers: dict[str, Any]) -> dict[str, str]:
    """Format the tables of docs/performance.md: our ways, and other libraries."""
    rows = []
    for name, result in steps["cases"].items():
        over, aim = result["over_unobserved"], CASES[name].aim
        cells = [format_ratio(over["observed"], aim), f"{aim:.2f}", format_ratio(over["fastest"])]
        cells += [format_ratio(result["over_plain"]["observed"])]
        cells += [format_ratio(over[way], limit) for way, limit in AIMS.items()]
        memory = result["bytes"]["observed"] / result["bytes"]["plain"]
        rows.append([name, *cells, format_ratio(memory)])
    head = ("network", "norms", "aim", "norms, fastest kernels", "norms over plain")
    ways = [
        f"{'noise scale' if way == 'noise' else way}, aim {aim:.1f}" for way, aim in AIMS.items()
    ]
    peer_rows = [
        [name, *(format_milliseconds(result["milliseconds"].get(peer)) for peer in PEERS)]
        for name, result in peers["cases"].items()
    ]
    return {
        "ledger": format_table((*head, *ways, "memory"), rows),
        "ledger-peers": format_table(("network", *PEERS.values()), peer_rows),
    }


def format_milliseconds(ms: float | None) -> str:
    """Format milliseconds by two digits or more; a dash where a library has no result."""
    return "-" if ms is None else f"{ms:.1f}" if ms < 10 else f"{ms:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result and the table")
    parser.add_argument("--peers", action="store_true", help="time other libraries instead")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="models whose names contain one of these"
    )
    parser.add_argument("--seconds", type=float, default=25, help="for each model, or 3 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    measure = compare_peers if args.peers else compare
    results = {}
    for name, case in CASES.items():
        if any(part in name for part in args.only):
            results[name] = measure(case, clock, args.seconds)
            show(name, results[name])
    if args.write:
        malloc = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
        name = "observed_peers" if args.peers else "observed_step"
        part = "" if args.only == [""] else "_part"
        result = {"clock": args.clock, "malloc": malloc, "cases": results}
        print(write_result(f"{name}{part}", result))


if __name__ == "__main__":
    main()
