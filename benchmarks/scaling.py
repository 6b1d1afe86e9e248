"""How the exact all-reduce scales, and what the order and the ledger cost at 10^12 examples.

    all-reduce   plain (gloo's ring, `distributed.all_sum`) against exact (`tree.sum_over_ranks`)
                 at 2, 4 and 8 ranks of this machine, in turn (A B A B ...); the link of two ranks
                 predicts the others
    simulated    the messages of each all-reduce at 4,096 ranks, by benchmarks/scaling_model.py
    order        seconds an index at 10^3, 10^6 and 10^12 examples, and memory
    ledger       bytes and seconds a row, of real rows

A time is that of the slowest rank, from a barrier on. That the bits of `exact` are the same at
every number of ranks is seen to here, as is that those of `plain` are not.

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
from anybatch.training.launch import launch
from anybatch.training.ledger import LedgerFiles, columns_of
from anybatch.zoo.losses import cross_entropy
from machine import write
from scaling_model import (
    Link,
    Network,
    exact_rounds,
    halving_rounds,
    in_buckets,
    levels_rounds,
    nodes_by_rank,
    played,
    ring_rounds,
)
from scaling_text import plots, text_from

DOCS = Path(__file__).parents[1] / "docs"
WORLDS = (2, 4, 8)
SIZES = tuple(2**power for power in (16, 18, 20, 22, 24))  # bytes of float32
GRAINS = {"plain": 8, "exact": 8, "exact, 10 grains": 10}
"""8 are one node a rank; 10 are up to three."""

RANKS = (8, 64, 512, 4096)  # powers of two
PARAMETERS = tuple(10**power for power in range(6, 12))
CLUSTER = Network(
    near=Link(3.4e-6, 1 / 450e9), far=Link(9.6e-6, 1 / 50e9), machine=8, gamma=3 / 3.35e12
)
"""Assumed. alpha: NVIDIA/nccl, src/graph/tuning.cc at 01afd20, hwLat, ring, Simple: NVLink and
network. beta: what is advertised of 8 H100 in a machine, 900 GB/s both ways, and 400 Gb/s each to
other machines. gamma: two reads and a write a byte, at 3.35 TB/s of memory."""

EXAMPLES = (10**3, 10**6, 10**12)
BATCH = 4096
OBSERVED = {
    "norms": Observe(norms=True),
    "norms, alignment, share": Observe(norms=True, alignment=True, share=True),
}


def held(size: int, grains: int, rank: int, ranks: int) -> list[Node[list[Tensor]]]:
    """The nodes of a rank: each grain is a random vector of its own."""
    nodes: list[Node[list[Tensor]]] = []
    for grain in range(rank * grains // ranks, (rank + 1) * grains // ranks):
        generator = torch.Generator().manual_seed(grain)
        leaf = [torch.randn(size // 4, generator=generator)]
        nodes = pairwise_sum.append_node(nodes, Node(grain, 0, leaf), pairwise_sum.add_lists)
    return nodes


def ways_of(size: int, group: Any) -> tuple[Callable[[], object], dict[str, Callable[[], Tensor]]]:
    """Every way of the sum over all grains, and what has to be done before each."""
    rank, ranks = distributed.rank_of(group), distributed.num_ranks(group)
    own = pairwise_sum.sum_nodes(held(size, GRAINS["plain"], rank, ranks), pairwise_sum.add_lists)[
        0
    ]
    kept = own.clone()

    def plain() -> Tensor:
        distributed.all_sum([own], group)
        return own

    def exactly(nodes: list[Node[list[Tensor]]], runs: list[tuple[int, int]]) -> Tensor:
        return pairwise_sum.sum_over_ranks(nodes, runs, [kept], group)[0]

    ways: dict[str, Callable[[], Tensor]] = {"plain": plain}
    for name in ("exact", "exact, 10 grains"):
        cuts = [each * GRAINS[name] // ranks for each in range(ranks + 1)]
        ways[name] = partial(exactly, held(size, GRAINS[name], rank, ranks), list(pairwise(cuts)))
    return lambda: own.copy_(kept), ways


def measured(seconds: float, group: Any) -> bytes:
    """Of each size: seconds of each way, round by round, and the bits of its sum; by pickle."""
    torch.set_num_threads(1)
    found = {}
    for size in SIZES:
        ready, ways = ways_of(size, group)
        bits = {}
        for name, way in ways.items():
            ready()
            bits[name] = hashlib.sha256(way().numpy().tobytes()).hexdigest()
        times: dict[str, list[float]] = {name: [] for name in ways}
        begun, goes_on = time.perf_counter(), True
        while goes_on:
            for name, way in ways.items():
                ready()
                dist.barrier(group)
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
            is_over = time.perf_counter() - begun > seconds and len(times["plain"]) >= 7
            goes_on = distributed.largest(int(not is_over), group) == 1
        found[size] = (times, bits)
    return pickle.dumps(found)


def all_reduces(seconds: float) -> dict[str, Any]:
    """Medians of the slowest rank's seconds, and of the ratios round by round."""
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[int, str], set[str]] = {}
    for ranks in WORLDS:
        told = [pickle.loads(one) for one in launch(partial(measured, seconds), ranks)]
        for size in SIZES:
            for way in GRAINS:
                seen.setdefault((size, way), set()).update(one[size][1][way] for one in told)
            slowest = {
                way: [max(each) for each in zip(*(one[size][0][way] for one in told), strict=True)]
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
            assert len(seen[size, way]) == 1, f"{way} is not exact at {size} bytes"
        assert len(seen[size, "plain"]) > 1, "the control has failed to fail"
    bits = {way: max(len(seen[size, way]) for size in SIZES) for way in GRAINS}
    return {"gamma": seconds_a_byte_added(), "rows": rows, "different bits": bits}


def seconds_a_byte_added() -> float:
    """gamma of this machine: vectors of 1 MiB, on one thread."""
    torch.set_num_threads(1)
    left, right = torch.ones(2**18), torch.ones(2**18)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        left.add_(right)
        times.append(time.perf_counter() - start)
    return median(times) / 2**20


def simulated() -> dict[str, Any]:
    """Seconds of each all-reduce of so many float32 parameters, by ranks."""
    whole, bucket = [4 * number for number in PARAMETERS], pairwise_sum.BUCKET_BYTES
    sizes = [*whole, *(size % bucket for size in whole), bucket]
    found: dict[str, Any] = {}
    for ranks in RANKS:
        ways = {
            "ring": (ring_rounds(ranks), None),
            "exact": (exact_rounds(ranks), None),
            "exact, ragged": (exact_rounds(ranks), nodes_by_rank(ragged(ranks), ranks)),
            "levels": (levels_rounds(ranks, CLUSTER.machine), None),
            "halving": (halving_rounds(ranks), None),
        }
        for name, (rounds, nodes) in ways.items():
            play = played(rounds, ranks, [size / ranks for size in sizes], CLUSTER, nodes)
            seconds = play.seconds.tolist()
            found.setdefault(name, {})[str(ranks)] = {
                "seconds": seconds[: len(whole)],
                "in buckets": [
                    in_buckets(bucket, size, seconds[-1], rest)
                    for size, rest in zip(whole, seconds[len(whole) :], strict=False)
                ],
                "messages": int(play.messages.max()),
                "bytes over n": int(play.slices.max()) / ranks,
            }
        print(f"  {ranks} ranks played", flush=True)
    return {
        "cluster": asdict(CLUSTER),
        "ranks": RANKS,
        "parameters": PARAMETERS,
        "bucket": bucket,
        "ways": found,
    }


def ragged(ranks: int) -> int:
    """A number of grains that is no power of two a rank, about 24.4."""
    return ranks * 100_000 // 4096


def orders() -> list[dict[str, Any]]:
    """Of each number of examples: seconds an index in a row, of a step anywhere, and memory."""
    found = []
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
        found.append({"examples": number, "index": row, "jump": jump, "peak_bytes": peak})
        print(f"  {found[-1]}", flush=True)
    return found


def randperm() -> list[dict[str, float]]:
    """Seconds an index of a permutation that is kept."""
    found = []
    for number in EXAMPLES[:2]:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.randperm(number)
            times.append(time.perf_counter() - start)
        found.append({"examples": number, "index": median(times) / number})
    return found


def ledger(observe: Observe, updates: int = 64) -> dict[str, float]:
    """A row of the ledger of a run: bytes on disk, bytes that travel, seconds to write it."""
    torch.manual_seed(0)
    model, order = nn.Linear(64, 10), ab.Order(10**12, batch_size=BATCH, seed=0)
    objective = ab.Objective(cross_entropy, ab.Mean())
    columns = []
    for step in range(updates):
        batch = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
        ids = order.indices(step)
        gradient = ab.batch_gradient(model, objective, batch, ids=ids, observe=observe)
        columns.append(columns_of(step, 0, gradient))
    files = [_written(columns) for _ in range(5)]
    rows = updates * BATCH
    return {
        "rows": rows,
        "columns": len(columns[0]),
        "bytes": files[0][0] / rows,
        "told": len(pickle.dumps(columns[0])) / BATCH,
        "seconds": median(seconds for _, seconds in files) / rows,
    }


def _written(updates: list[dict[str, Tensor]]) -> tuple[int, float]:
    """Bytes of a file of these updates, and the seconds it took."""
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
    parser.add_argument("--write", action="store_true", help="keep raw result and document")
    parser.add_argument("--seconds", type=float, default=4, help="for each size and rank number")
    args = parser.parse_args()
    begun = time.perf_counter()
    result: dict[str, Any] = {"all-reduce": all_reduces(args.seconds)}
    result["order"], result["randperm"] = orders(), randperm()
    result["ledger"] = {name: ledger(observe) for name, observe in OBSERVED.items()}
    result["simulated"] = simulated()
    result["seconds"] = time.perf_counter() - begun
    if not args.write:
        return
    path = write("scaling", result)
    print(path)
    _write_document(json.loads(path.read_text()))


def _write_document(result: dict[str, Any]) -> None:
    (DOCS / "scaling.md").write_text(text_from(result), encoding="utf8")
    (DOCS / "scaling").mkdir(exist_ok=True)
    for name, text in plots(result).items():
        (DOCS / "scaling" / f"{name}.svg").write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
