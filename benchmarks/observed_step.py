"""What a look at every example's gradient costs: seconds a step, observed and not.

Every way of making the step is timed once a round, in turn (A B A B ...); ratios are taken round
by round, and their median is reported. Each step leaves the gradient of the mean loss in `.grad`:

    plain          PyTorch: forward, mean loss, backward
    channels_last  the same with channels last in memory, where there are images
    unobserved     anybatch.batch_gradient
    observed       with every example's norm, in all and by parameter
    pinned         the same by torch's own kernels alone
    noise          observed, and the noise scale
    alignment      norms and <grad m_i, G>, in one micro-batch and in four
    clipped        each example's gradient clipped to a norm
    whole          every example's gradient itself: in rounds of its own, for it moves much memory

and what others make of it, with --peers (`observed_peers.py`). Bytes are the most that tensors
hold within a step, parameters and inputs apart, counted by `PeakBytes`. Much of a step's time may
be the system's, which hands out memory page by page; glibc keeps it under

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
from observed_peers import peers

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]
Clock = Callable[[], float]
NORMS = {"norms": True, "parameter_norms": True}


def plain(model: nn.Module, batch: Batch) -> Step:
    """Forward, mean loss, backward."""
    inputs, targets = batch

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()

    return step


def channels_last(case: Case, batch: Batch) -> Step:
    """The plain step of images."""
    to: dict[str, Any] = {"memory_format": torch.channels_last}
    return plain(case.make().to(**to), (batch[0].to(**to), batch[1]))


def ours(case: Case, model: nn.Module, batch: Batch, micro_batches: int = 1, **how: Any) -> Step:
    """`batch_gradient`."""
    objective = Objective(case.losses)
    layout = Layout(micro_batch=-(-len(batch[0]) // micro_batches))
    return lambda: batch_gradient(model, objective, batch, layout=layout, **how)


def pinned(step: Step) -> Step:
    """The same by torch's own kernels."""

    def own() -> None:
        kernels.use("torch")
        step()
        kernels.use("fastest")

    return own


def steps_of(case: Case, model: nn.Module, batch: Batch) -> dict[str, Step]:
    """Every way of making the step but `whole`, by name."""
    observed = ours(case, model, batch, observe=Observe(**NORMS))
    aligned = Observe(norms=True, alignment=True)
    found = {
        "plain": plain(model, batch),
        "unobserved": ours(case, model, batch),
        "observed": observed,
        "pinned": pinned(observed),
        "noise": ours(case, model, batch, observe=Observe(**NORMS, noise_scale=True)),
        "alignment": ours(case, model, batch, observe=aligned),
        "unobserved in 4": ours(case, model, batch, 4),
        "alignment in 4": ours(case, model, batch, 4, observe=aligned),
        "clipped": ours(case, model, batch, clip=ClipExamples(1.0)),
    }
    if batch[0].ndim == 4:
        found["channels_last"] = channels_last(case, batch)
    return found


def timed(steps: dict[str, Step], clock: Clock, seconds: float, least: int) -> dict[str, Any]:
    """Seconds of each step, round by round; a first round warms up, and makes choices."""
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    begun, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begun < seconds:
        for name, step in steps.items():
            start = clock()
            step()
            found[name].append(clock() - start)
        rounds += 1
    return found


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def peak_bytes(step: Step) -> int:
    """The most that tensors made in a step hold."""
    with PeakBytes() as memory:
        step()
    return int(memory.peak)


def compare(case: Case, clock: Clock, seconds: float, with_peers: bool) -> dict[str, Any]:
    """All that is measured of a model."""
    torch.manual_seed(0)
    model, batch = case.make(), case.batch()
    steps = steps_of(case, model, batch)
    times = timed(steps, clock, seconds, least=3)
    others, skipped = peers(model, batch) if with_peers else ({}, {})
    whole = {"whole": ours(case, model, batch, observe=Observe(gradients=True)), **others}
    more = timed({"plain": steps["plain"], **whole}, clock, 0.0, least=2)
    over_unobserved = {name: ratio(times, name, "unobserved") for name in steps}
    over_unobserved["alignment in 4"] = ratio(times, "alignment in 4", "unobserved in 4")
    return {
        "rounds": len(times["plain"]),
        "milliseconds": {name: 1e3 * median(each) for name, each in (more | times).items() if each},
        "over_plain": {name: ratio(times, name, "plain") for name in steps}
        | {name: ratio(more, name, "plain") for name in whole},
        "over_unobserved": over_unobserved,
        "bytes": {name: peak_bytes(steps[name]) for name in ("plain", "observed")},
        "skipped": skipped,
        "to_reach": {
            "observed": case.over_unobserved,
            "observed over plain": case.over_plain,
            **BOUNDS,
        },
    }


def show(name: str, found: dict[str, Any]) -> None:
    """A line for each way."""
    print(f"{name}: {found['rounds']} rounds")
    for way, ms in found["milliseconds"].items():
        own = found["over_unobserved"].get(way)
        over = "" if own is None else f", {own:.3f} of unobserved"
        print(f"  {way:28}{ms:10.2f} ms, {found['over_plain'].get(way, 1):7.3f} of plain{over}")
    held = found["bytes"]
    print(f"  bytes, observed over plain  {held['observed'] / held['plain']:.3f}")
    for peer, why in found["skipped"].items():
        print(f"  {peer}: left out, {why}")
    print(f"  to reach: {found['to_reach']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--peers", action="store_true", help="time others too")
    parser.add_argument("--only", nargs="*", default=[""], help="models that hold one of these")
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
        print(write("observed_step", {**how, "cases": results}))


if __name__ == "__main__":
    main()
