"""Measure the gain of sending the exact sum's buckets while the last backward pass still runs.

Every way to compute one update is timed once a round, in turn (A B C D A B ...), by the first of
two ranks, from one barrier to the next. The result has the quartiles of the ratios in each round.
Ranks are processes of this machine over gloo, with one thread each:

    alone        the same passes without messages, each rank with its share
    at the end   send everything after the last pass, in pieces of up to pairwise_sum.BUCKET_BYTES
    in buckets   send after the last pass too, but in the buckets of `overlapped`
    overlapped   as anybatch.batch_gradient does

They run over loopback, and over a link between two network namespaces whose rate `tc` limits (tbf;
the delay is that of the machine). The command fails if the bits differ. `load` is the number of
processes that wanted a core, with these two. If it is above the number of cores, read the
quartiles.

    python benchmarks/overlap.py [--write] [--seconds 20]
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anybatch import distributed
from anybatch.gradient import batch_gradient, buckets, survey
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.tree_accumulator import TreeAccumulator
from anybatch.kernels import choice as kernels
from anybatch.training.batches import share_evenly
from bitwise import CASES, Case, Step, hash_gradient
from machine import write

RATES = ("1gbit",)
GPT = CASES["GPT d=256, 4 layers, T=64, B=64, grain 8"]
NUM_LAYERS, WIDTH, WAITS = 8, 640, 0.01


class _Wait(torch.autograd.Function):
    """Identity whose backward waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(WAITS)
        return gradients[0]


class Waiting(nn.Module):
    """Layers whose backward waits without a core, as if for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = _Wait.apply(layer(x))
        return x[:, :10]


MEASURED = {
    "8 layers that wait 10 ms each, 13 MB, 1 grain a rank": Case(
        make=Waiting, inputs=(4, WIDTH), grain=2
    ),
    "GPT d=256, 13 MB, 1 grain a rank": replace(GPT, grain=32),
    "MLP 784-512-512-10, 3 MB, 4 grains a rank": CASES["MLP 784-512-512-10, B=256, grain 32"],
}


def build_ways(case: Case, group: Any) -> tuple[nn.Module, dict[str, Step]]:
    """Return the model, and every way to compute its update."""
    torch.manual_seed(1)
    model, batch, objective = case.make(), case.batch(), case.objective()
    share = share_evenly(group)(len(batch[0]))
    share_batch = tuple(column[share] for column in batch)
    facts = survey.get_facts(model, objective.example_losses, survey.survey_model(model).mode)

    def overlap() -> None:
        facts.comes_in_portions = False
        batch_gradient(model, objective, share_batch, group=group, bitwise=True)

    def in_buckets() -> None:
        facts.comes_in_portions = True
        batch_gradient(model, objective, share_batch, group=group, bitwise=True)

    def at_the_end() -> None:
        with (
            mock.patch.object(TreeAccumulator, "backward_passes", Accumulator.backward_passes),
            mock.patch.object(buckets, "_NUM_BUCKETS", 1),
        ):
            batch_gradient(model, objective, share_batch, group=group, bitwise=True)

    return model, {
        "alone": lambda: batch_gradient(model, objective, share_batch, bitwise=True),
        "at the end": at_the_end,
        "in buckets": in_buckets,
        "overlapped": overlap,
    }


def measure_rank(name: str, seconds: float, group: Any) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, as this rank sees them."""
    torch.set_num_threads(1)
    kernels.use("torch")
    model, ways = build_ways(MEASURED[name], group)
    hashes = set()
    for way, step in ways.items():  # and warm up
        for _ in range(2):
            step()
        if way != "alone":
            hashes.add(hash_gradient(model))
    assert len(hashes) == 1, "the bits are not the same"
    times: dict[str, list[float]] = {way: [] for way in ways}
    beginning, goes_on = time.perf_counter(), True
    while goes_on:
        for way, step in ways.items():
            dist.barrier(group)
            start = time.perf_counter()
            step()
            dist.barrier(group)
            times[way].append(time.perf_counter() - start)
        is_over = time.perf_counter() - beginning > seconds and len(times["alone"]) >= 9
        goes_on = distributed.all_reduce_max(int(not is_over), group) == 1
    return times


@contextmanager
def create_link(rate: str) -> Iterator[list[list[str]]]:
    """Create two namespaces with a cable; yield the prefix of a command in each.

    Raises:
        OSError: this machine cannot create them.
    """
    names = [f"overlap{os.getpid()}-{rank}" for rank in range(2)]
    shaped = ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "100ms")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        far = ("peer", "name", "eth0", "netns", names[1])
        _run("ip", "-n", names[0], "link", "add", "eth0", "type", "veth", *far)
        for rank, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"10.78.0.{rank + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *shaped)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def compare(name: str, seconds: float, prefixes: Sequence[list[str]], device: str) -> Any:
    """Measure a case over a link."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--seconds", str(seconds), "--case", name]
        where = {**os.environ, "GLOO_SOCKET_IFNAME": device}
        processes = [
            subprocess.Popen([*prefix, *command, "--rank", f"{rank},{folder}"], env=where)
            for rank, prefix in enumerate(prefixes)
        ]
        codes = [one.wait() for one in processes]
        if any(codes):
            raise SystemExit(f"A rank failed in {name}.")
        times = pickle.loads((Path(folder) / "times").read_bytes())
    return {
        "rounds": len(times["alone"]),
        "load": os.getloadavg()[0],
        "milliseconds": {way: 1e3 * median(each) for way, each in times.items()},
        "over at the end": {
            way: compare_quartiles(each, times["at the end"]) for way, each in times.items()
        },
    }


def compare_quartiles(these: list[float], those: list[float]) -> list[float]:
    """Return the quartiles of the ratios in each round."""
    return quantiles((a / b for a, b in zip(these, those, strict=True)), n=4)


def run_rank(rank: int, folder: str, name: str, seconds: float) -> None:
    """Run one rank."""
    with distributed.init_group(rank, 2, f"file://{folder}/store") as group:
        times = measure_rank(name, seconds, group)
        if rank == 0:
            (Path(folder) / "times").write_bytes(pickle.dumps(times))


def show(link: str, name: str, result: Any) -> None:
    """Print a line for each way."""
    print(f"{link}: {name}, {result['rounds']} rounds, load {result['load']:.1f}")
    for way, ms in result["milliseconds"].items():
        low, middle, high = result["over at the end"][way]
        print(f"  {way:11}{ms:9.2f} ms, of at the end {middle:6.3f} ({low:.3f} to {high:.3f})")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--seconds", type=float, default=20, help="for each case and link")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank, _, folder = args.rank.partition(",")
        run_rank(int(rank), folder, args.case, args.seconds)
        return
    names = [args.case] if args.case else list(MEASURED)
    results: dict[str, Any] = {}
    for link in ("loopback", *RATES):
        try:
            with create_link(link) if link in RATES else nullcontext([[], []]) as prefixes:
                device = "eth0" if link in RATES else "lo"
                results[link] = {}
                for name in names:
                    results[link][name] = compare(name, args.seconds, prefixes, device)
                    show(link, name, results[link][name])
        except OSError as error:
            results[link] = f"not available here: {error}"
            print(link, results[link])
    if args.write:
        print(write("overlap", {"links": results}))


if __name__ == "__main__":
    main()
