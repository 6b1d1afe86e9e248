"""Training on 3 GB of Parquet in shuffled order: memory, and throughput against data in memory.

A file of 768 floats and a class an example is written and cached. Then one process for each
source trains an MLP on one thread with a keyed order over all rows: from memory, from the cache,
from the cache with its file dropped from the system's page cache before each chunk, and so with a
worker that reads ahead. They take turns, a chunk of updates each (A B A B), and a source's ratio
is the median over the rounds of

    seconds of the chunk from memory / seconds of its own chunk

by the wall clock and, where the machine is busy with other work, by the processor time of the
process, which counts no waiting and no worker. Memory is VmHWM at the end - VmRSS of the bare
process, of /proc/self/status: the bare process has imported anybatch and torch and made the model,
and VmHWM is the most that was ever resident, anonymous pages, mapped files and shared memory
together. What a worker holds is not in it.

    python benchmarks/larger_than_memory.py [--write]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

import anybatch as ab
from anybatch.data import load_parquet
from anybatch.zoo import losses, mlp
from machine import write

WIDTH, HIDDEN, CLASSES, BATCH = 768, [512, 512], 10, 256
CHUNK = 20  # updates
ROW_GROUP = 20_000
SOURCES = ("from cache", "from disk", "from disk, 1 worker")
TO_REACH = {"memory_bytes": 10**9, "ratio": 0.7}


def write_parquet(path: Path, num_examples: int) -> int:
    """A file with classes that the inputs tell; its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    directions = generator.standard_normal((WIDTH, CLASSES), dtype=np.float32)
    row = pa.list_(pa.float32(), WIDTH)
    schema = pa.schema([("inputs", row), ("target", pa.int64())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, num_examples, ROW_GROUP):
            size = min(ROW_GROUP, num_examples - start)
            inputs = generator.standard_normal((size, WIDTH), dtype=np.float32)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(inputs.reshape(-1)), type=row),
                pa.array((inputs @ directions).argmax(1)),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return path.stat().st_size


def status(field: str) -> int:
    """A figure of this process, in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def part(name: str, path: str) -> None:
    """What one process does: load, make as many updates as each line asks for, tell of both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mlp([WIDTH], HIDDEN)
    bare, begun = status("VmRSS"), time.perf_counter()
    data: Any = load_parquet(path, "target", cache=True)
    inputs, targets = data.columns
    file = inputs.path
    if name == "from memory":
        inputs = inputs.rows(torch.arange(len(data)))
    say({"load_seconds": time.perf_counter() - begun})
    steps = training(model, (inputs, targets), workers=int("worker" in name))
    for line in sys.stdin:
        if "disk" in name:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        wall, processor = time.perf_counter(), time.process_time()
        for step in islice(steps, int(line)):
            loss = step.loss
        seconds = time.perf_counter() - wall, time.process_time() - processor
        say({"wall": seconds[0], "processor": seconds[1], "loss": loss})
    more = {"anonymous_at_end": status("RssAnon"), "files_at_end": status("RssFile")}
    say({"bare_bytes": bare, "bytes": status("VmHWM") - bare, **more})


def training(model: nn.Module, data: Any, workers: int) -> Iterator[ab.Step]:
    """Updates without end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = ab.Order(len(data[1]), batch_size=BATCH, seed=0)
    objective = ab.Objective(losses["cross_entropy"])
    return ab.steps(model, objective, optimizer, data, order=order, epochs=10**6, workers=workers)


def say(found: dict[str, Any]) -> None:
    """One line for the process that asks."""
    print(json.dumps(found), flush=True)


def begun(name: str, path: Path) -> subprocess.Popen[str]:
    """A new process for a part, that has loaded its data."""
    command = [sys.executable, __file__, "--part", name, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], updates: int | None = None) -> dict[str, Any]:
    """What it says next; to a number of updates, or (None) without being asked."""
    assert process.stdin is not None
    assert process.stdout is not None
    if updates is not None:
        print(updates, file=process.stdin, flush=True)
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its memory, once it has nothing more to do."""
    assert process.stdin is not None
    process.stdin.close()
    found = answer(process)
    process.wait()
    return found


def compare(name: str, path: Path, rounds: int) -> dict[str, Any]:
    """One source against memory, A B A B."""
    processes = [begun("from memory", path), begun(name, path)]
    loaded = [answer(process)["load_seconds"] for process in processes]
    for process in processes:
        answer(process, CHUNK)  # to warm up
    chunks = [[answer(process, CHUNK) for process in processes] for _ in range(rounds)]
    if any(memory["loss"] != own["loss"] for memory, own in chunks):
        raise AssertionError("expected the same bits from every source")
    memory = [ended(process) for process in processes]
    found = {"load_seconds": loaded, "memory": memory, "loss": chunks[-1][0]["loss"]}
    for clock in ("wall", "processor"):
        pairs = [[chunk[clock] for chunk in pair] for pair in chunks]
        found |= {
            f"{clock}_ratio": median(memory / own for memory, own in pairs),
            f"{clock}_examples_per_second": [
                CHUNK * BATCH / median(p) for p in zip(*pairs, strict=True)
            ],
            f"{clock}_seconds": [[round(seconds, 4) for seconds in pair] for pair in pairs],
        }
    return found


def measure(folder: Path, num_examples: int, rounds: int) -> dict[str, Any]:
    """All parts, and what they come to."""
    path = folder / "data.parquet"
    parquet_bytes = write_parquet(path, num_examples)
    process = begun("make cache", path)
    made = answer(process) | ended(process)
    found = {}
    for name in SOURCES:
        found[name] = compare(name, path, rounds)
        print(told(name, found[name]), flush=True)
    return {
        "parquet_bytes": parquet_bytes,
        "examples": num_examples,
        "network": f"{WIDTH}-{HIDDEN[0]}-{HIDDEN[1]}-{CLASSES}, B={BATCH}",
        "chunk_updates": CHUNK,
        "to_reach": TO_REACH,
        "make cache": made,
        "of pairs (from memory, the source)": found,
    }


def told(name: str, found: dict[str, Any]) -> str:
    """One line of figures."""
    memory, own = (each["bytes"] / 1e9 for each in found["memory"])
    return (
        f"{name}: {found['wall_ratio']:.3f} of the throughput from memory by the wall clock, "
        f"{found['processor_ratio']:.3f} by processor time, to reach {TO_REACH['ratio']}; "
        f"{own:.3f} GB above the bare process, from memory {memory:.3f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part:
        part(*args.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.examples, args.rounds)
    made = result["make cache"]
    print(
        f"make cache: {made['load_seconds']:.1f} s, {made['bytes'] / 1e9:.3f} GB above the bare "
        f"process, to stay below {TO_REACH['memory_bytes'] / 1e9:.0f} GB"
    )
    if args.write:
        print(write("larger_than_memory", result))


if __name__ == "__main__":
    main()
