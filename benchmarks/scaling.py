"""Measure how the exact all-reduce scales, and what order and ledger cost at 10^12 examples.

    all-reduce   plain (gloo's ring, `distributed.all_reduce_sum`) against exact
                 (`pairwise_sum.sum_over_ranks`) at 2, 4 and 8 ranks of this machine, in turn
                 (A B A B ...)
    simulated    the messages of each all-reduce, up to 4,096 ranks, by benchmarks/scaling_model.py
    order        seconds an index at 10^3, 10^6 and 10^12 examples, and memory
    ledger       bytes and seconds a row, of real rows

A time is that of the slowest rank, from a barrier on. The command fails if the bits of `exact`
depend on the number of ranks, or if those of `plain`, the control, do not. It writes the tables and
plots of docs/scaling.md; the prose there is written by hand.

    python benchmarks/scaling.py [--write] [--seconds 4]
"""

import argparse
import hashlib
import json
import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import anybatch as ab
from anybatch import distributed
from anybatch.gradient import pairwise_sum
from anybatch.gradient.pairwise_sum import Node
from anybatch.ledger import Observe
from anybatch.runs.ledger_files import LedgerFiles, make_columns
from anybatch.training.launch import launch
from anybatch.zoo.losses import cross_entropy
from machine import write
from scaling_model import (
    Link,
    Network,
    count_nodes,
    exact_rounds,
    halving_rounds,
    in_buckets,
    levels_rounds,
    play,
    ring_rounds,
)
from scaling_tables import draw_plots, format_tables
from tables import update_document

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
WORLDS = (2, 4, 8)
SIZES = tuple(2**power for power in (16, 18, 20, 22, 24))  # bytes of float32
GRAINS = {"plain": 8, "exact": 8, "exact, 10 grains": 10}
"""Grains of the batch: 8 make one node on each rank, 10 make up to three."""

RANKS = (8, 64, 512, 4096)  # powers of two
PARAMETERS = tuple(10**power for power in range(6, 12))
CLUSTER = Network(
    near=Link(3.4e-6, 1 / 450e9), far=Link(9.6e-6, 1 / 50e9), machine=8, gamma=3 / 3.35e12
)
"""Assumed. alpha: NVIDIA/nccl, src/graph/tuning.cc at 01afd20, hwLat, ring, Simple, for NVLink and
network. beta: the advertised 900 GB/s (both ways) between the 8 H100 of a machine, and 400 Gb/s
from each to other machines. gamma: two reads and a write a byte, at 3.35 TB/s of memory."""

EXAMPLES = (10**3, 10**6, 10**12)
BATCH = 4096
OBSERVED = {
    "norms": Observe(norms=True),
    "norms, alignment, share": Observe(norms=True, alignment=True, share=True),
}


def build_nodes(size: int, grains: int, rank: int, ranks: int) -> list[Node[list[Tensor]]]:
    """Build the nodes of a rank; each grain is a different random vector."""
    nodes: list[Node[list[Tensor]]] = []
    for grain in range(rank * grains // ranks, (rank + 1) * grains // ranks):
        generator = torch.Generator().manual_seed(grain)
        leaf = [torch.randn(size // 4, generator=generator)]
        nodes = pairwise_sum.append_node(nodes, Node(grain, 0, leaf), pairwise_sum.add_lists)
    return nodes


def build_ways(
    size: int, group: Any
) -> tuple[Callable[[], object], dict[str, Callable[[], Tensor]]]:
    """Return a function to call before each sum, and each way to sum over all grains."""
    rank, ranks = distributed.get_rank(group), distributed.get_num_ranks(group)
    nodes = build_nodes(size, GRAINS["plain"], rank, ranks)
    (total,) = pairwise_sum.sum_nodes(nodes, pairwise_sum.add_lists)
    original = total.clone()

    def plain() -> Tensor:
        distributed.all_reduce_sum([total], group)
        return total

    def exact(nodes: list[Node[list[Tensor]]], runs: list[tuple[int, int]]) -> Tensor:
        return pairwise_sum.sum_over_ranks(nodes, runs, [original], group)[0]

    ways: dict[str, Callable[[], Tensor]] = {"plain": plain}
    for name in ("exact", "exact, 10 grains"):
        cuts = [each * GRAINS[name] // ranks for each in range(ranks + 1)]
        ways[name] = partial(
            exact, build_nodes(size, GRAINS[name], rank, ranks), list(pairwise(cuts))
        )
    return lambda: total.copy_(original), ways


def time_ways(seconds: float, group: Any) -> bytes:
    """Return, pickled: by size, the seconds of each way in each round, and a hash of its sum."""
    torch.set_num_threads(1)
    results = {}
    for size in SIZES:
        reset, ways = build_ways(size, group)
        bits = {}
        for name, way in ways.items():
            reset()
            bits[name] = hashlib.sha256(way().numpy().tobytes()).hexdigest()
        times: dict[str, list[float]] = {name: [] for name in ways}
        start_of_size, goes_on = time.perf_counter(), True
        while goes_on:
            for name, way in ways.items():
                reset()
                dist.barrier(group)
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
            is_over = time.perf_counter() - start_of_size > seconds and len(times["plain"]) >= 7
            goes_on = distributed.all_reduce_max(int(not is_over), group) == 1
        results[size] = (times, bits)
    return pickle.dumps(results)


def compare_all_reduces(seconds: float) -> dict[str, Any]:
    """Return medians of the slowest rank's seconds, and of the ratios in each round."""
    rows: list[dict[str, Any]] = []
    hashes: dict[tuple[int, str], set[str]] = {}
    for ranks in WORLDS:
        per_rank = [pickle.loads(one) for one in launch(partial(time_ways, seconds), ranks)]
        for size in SIZES:
            for way in GRAINS:
                hashes.setdefault((size, way), set()).update(one[size][1][way] for one in per_rank)
            slowest = {
                way: [
                    max(each) for each in zip(*(one[size][0][way] for one in per_rank), strict=True)
                ]
                for way in GRAINS
            }
            over = {
                way: median(a / b for a, b in zip(slowest[way], slowest["plain"], strict=True))
                for way in GRAINS
            }
            rows.append(
                {
                    "ranks": ranks,
                    "bytes": size,
                    "rounds": len(slowest["plain"]),
                    "seconds": {way: median(each) for way, each in slowest.items()},
                    "over plain": over,
                }
            )
            print(f"  {ranks} ranks, {size:9,} bytes, over plain: {over}", flush=True)
    for size in SIZES:
        for way in list(GRAINS)[1:]:
            assert len(hashes[size, way]) == 1, f"{way} has different bits at {size} bytes"
        assert len(hashes[size, "plain"]) > 1, (
            "plain, the control, has the same bits at every number of ranks"
        )
    bits = {way: max(len(hashes[size, way]) for size in SIZES) for way in GRAINS}
    return {"gamma": measure_gamma(), "rows": rows, "different bits": bits}


def measure_gamma() -> float:
    """Measure gamma of this machine, with vectors of 1 MiB on one thread."""
    torch.set_num_threads(1)
    left, right = torch.ones(2**18), torch.ones(2**18)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        left.add_(right)
        times.append(time.perf_counter() - start)
    return median(times) / 2**20


def simulate() -> dict[str, Any]:
    """Simulate each all-reduce of float32 gradients, by ranks and parameters."""
    whole, bucket = [4 * number for number in PARAMETERS], pairwise_sum.BUCKET_BYTES
    sizes = [*whole, *(size % bucket for size in whole), bucket]
    results: dict[str, Any] = {}
    for ranks in RANKS:
        ways = {
            "ring": (ring_rounds(ranks), None),
            "exact": (exact_rounds(ranks), None),
            "exact, ragged": (exact_rounds(ranks), count_nodes(count_ragged_grains(ranks), ranks)),
            "levels": (levels_rounds(ranks, CLUSTER.machine), None),
            "halving": (halving_rounds(ranks), None),
        }
        for name, (rounds, nodes) in ways.items():
            timing = play(rounds, ranks, [size / ranks for size in sizes], CLUSTER, nodes)
            seconds = timing.seconds.tolist()
            results.setdefault(name, {})[str(ranks)] = {
                "seconds": seconds[: len(whole)],
                "in buckets": [
                    in_buckets(bucket, size, seconds[-1], rest)
                    for size, rest in zip(whole, seconds[len(whole) :], strict=False)
                ],
                "messages": int(timing.messages.max()),
                "bytes over n": int(timing.slices.max()) / ranks,
            }
        print(f"  {ranks} ranks played", flush=True)
    return {
        "cluster": asdict(CLUSTER),
        "ranks": RANKS,
        "parameters": PARAMETERS,
        "bucket": bucket,
        "ways": results,
    }


def count_ragged_grains(ranks: int) -> int:
    """Return a number of grains that is not a power of two a rank: about 24.4."""
    return ranks * 100_000 // 4096


def time_orders() -> list[dict[str, Any]]:
    """Measure seconds an index in a row, seconds of any step, and memory, by number of examples."""
    results = []
    for number in EXAMPLES:
        order = ab.Order(number, batch_size=256, seed=0, last="carry")
        rows, jumps = [], []
        for part in range(5):
            start = time.perf_counter()
            for step in range(part * 4096, (part + 1) * 4096):  # 2^20 indices
                order.indices(step)
            rows.append((time.perf_counter() - start) / 2**20)
        generator = torch.Generator().manual_seed(0)
        for step in torch.randint(2**31, (50,), generator=generator).tolist():
            start = time.perf_counter()
            order.indices(step)
            jumps.append(time.perf_counter() - start)
        tracemalloc.start()
        for step in range(2**31, 2**31 + 4096):
            order.indices(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row, jump = median(rows), median(jumps)
        results.append({"examples": number, "index": row, "jump": jump, "peak_bytes": peak})
        print(f"  {results[-1]}", flush=True)
    return results


def time_randperm() -> list[dict[str, float]]:
    """Measure seconds an index of a permutation in memory."""
    results = []
    for number in EXAMPLES[:2]:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.randperm(number)
            times.append(time.perf_counter() - start)
        results.append({"examples": number, "index": median(times) / number})
    return results


def measure_ledger(observe: Observe, updates: int = 64) -> dict[str, float]:
    """Measure a row of the ledger: bytes on disk, bytes to other ranks, seconds to write it."""
    torch.manual_seed(0)
    model, order = nn.Linear(64, 10), ab.Order(10**12, batch_size=BATCH, seed=0)
    objective = ab.Objective(cross_entropy, ab.Mean())
    columns = []
    for step in range(updates):
        batch = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
        ids = order.indices(step)
        gradient = ab.batch_gradient(model, objective, batch, ids=ids, observe=observe)
        columns.append(make_columns(step, 0, gradient))
    files = [_write_ledger(columns) for _ in range(5)]
    rows = updates * BATCH
    return {
        "rows": rows,
        "columns": len(columns[0]),
        "bytes": files[0][0] / rows,
        "told": len(pickle.dumps(columns[0])) / BATCH,
        "seconds": median(seconds for _, seconds in files) / rows,
    }


def _write_ledger(updates: list[dict[str, Tensor]]) -> tuple[int, float]:
    """Write a file of these updates, and return its bytes and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        files = LedgerFiles(Path(folder) / "ledger")
        files.begin(0)
        for step, columns in enumerate(updates):
            files.add(step, [columns])
        start = time.perf_counter()
        files.flush()
        seconds = time.perf_counter() - start
        (file,) = (Path(folder) / "ledger").iterdir()
        return file.stat().st_size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write raw result and document")
    parser.add_argument(
        "--seconds", type=float, default=4, help="for each size and number of ranks"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    result: dict[str, Any] = {"all-reduce": compare_all_reduces(args.seconds)}
    result["order"], result["randperm"] = time_orders(), time_randperm()
    result["ledger"] = {name: measure_ledger(observe) for name, observe in OBSERVED.items()}
    result["simulated"] = simulate()
    result["seconds"] = time.perf_counter() - start
    if args.write:
        raw = json.loads(write("scaling", result).read_text())
        update_document(DOCUMENT, format_tables(raw), draw_plots(raw))


if __name__ == "__main__":
    main()
