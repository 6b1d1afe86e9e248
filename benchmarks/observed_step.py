"""Measure the cost of observing every example's gradient: seconds a step, observed and not.

Every way to compute the step is timed once a round, in turn (A B A B ...). The first updates, which
the ledger confirms one by one, are left out. The result is the median
of the ratios in each round. Each step leaves the gradient of the mean loss in `.grad`:

    plain          PyTorch: forward, mean loss, backward
    channels_last  the same with channels last in memory, for images
    unobserved     anybatch.batch_gradient
    observed       with every example's norm, in total and by parameter
    pinned         the same with torch's own kernels only
    noise          observed, and the noise scale
    alignment      norms and <grad m_i, G>, in one micro-batch and in four
    clipped        each example's gradient clipped to a norm
    whole          every example's gradient itself, in separate rounds, since it moves much memory

--peers adds other libraries (`observed_peers.py`). Bytes are the peak of tensors within a step, by
`PeakBytes`, without parameters and inputs. A large part of a step can be the system's, which hands
out memory page by page. glibc keeps this memory with

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
from machine import write
from observed_models import BOUNDS, CASES, Case
from observed_peers import build_peers

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]
Clock = Callable[[], float]
NUM_CONFIRMED = 17  # more than the updates that the ledger confirms at first, which are left out
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


def pin_kernels(step: Step) -> Step:
    """Build the same step with torch's own kernels."""

    def step_pinned() -> None:
        kernels.use("torch")
        step()
        kernels.use("fastest")

    return step_pinned


def build_steps(case: Case, model: nn.Module, batch: Batch) -> dict[str, Step]:
    """Build every step except `whole`, by name."""
    observed = build_ours(case, model, batch, observe=Observe(**NORMS))
    aligned = Observe(norms=True, alignment=True)
    steps = {
        "plain": build_plain(model, batch),
        "unobserved": build_ours(case, model, batch),
        "observed": observed,
        "pinned": pin_kernels(observed),
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


def compare(case: Case, clock: Clock, seconds: float, with_peers: bool) -> dict[str, Any]:
    """Measure all ways for a model."""
    torch.manual_seed(0)
    model, batch = case.make(), case.batch()
    steps = build_steps(case, model, batch)
    for _ in range(NUM_CONFIRMED):
        steps["observed"]()
        steps["alignment in 4"]()
    times = time_steps(steps, clock, seconds, least=3)
    others, skipped = build_peers(model, batch) if with_peers else ({}, {})
    whole = {"whole": build_ours(case, model, batch, observe=Observe(gradients=True)), **others}
    more = time_steps({"plain": steps["plain"], **whole}, clock, 0.0, least=2)
    over_unobserved = {name: median_ratio(times, name, "unobserved") for name in steps}
    over_unobserved["alignment in 4"] = median_ratio(times, "alignment in 4", "unobserved in 4")
    return {
        "rounds": len(times["plain"]),
        "milliseconds": {name: 1e3 * median(each) for name, each in (more | times).items() if each},
        "over_plain": {name: median_ratio(times, name, "plain") for name in steps}
        | {name: median_ratio(more, name, "plain") for name in whole},
        "over_unobserved": over_unobserved,
        "bytes": {name: measure_peak(steps[name]) for name in ("plain", "observed")},
        "skipped": skipped,
        "to_reach": {
            "observed": case.over_unobserved,
            "observed over plain": case.over_plain,
            **BOUNDS,
        },
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print a line for each way."""
    print(f"{name}: {result['rounds']} rounds")
    for way, ms in result["milliseconds"].items():
        ratio = result["over_unobserved"].get(way)
        over = "" if ratio is None else f", {ratio:.3f} of unobserved"
        print(f"  {way:28}{ms:10.2f} ms, {result['over_plain'].get(way, 1):7.3f} of plain{over}")
    num_bytes = result["bytes"]
    print(f"  bytes, observed over plain  {num_bytes['observed'] / num_bytes['plain']:.3f}")
    for peer, why in result["skipped"].items():
        print(f"  {peer}: left out, {why}")
    print(f"  to reach: {result['to_reach']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--peers", action="store_true", help="time other libraries too")
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
    results = {}
    for name, case in CASES.items():
        if any(part in name for part in args.only):
            results[name] = compare(case, clock, args.seconds, args.peers)
            show(name, results[name])
    if args.write:
        malloc = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
        how = {"clock": args.clock, "malloc": malloc}
        name = "observed_step" if args.only == [""] else "observed_step_part"
        print(write(name, {**how, "cases": results}))


if __name__ == "__main__":
    main()
