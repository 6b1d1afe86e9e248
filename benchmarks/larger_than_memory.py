"""Train on 3 GB of Parquet in shuffled order: memory, and throughput against data in memory.

A file with 768 floats and a class for each example is written and cached. Then one process for each
source trains an MLP on one thread with a keyed order over all rows: from memory; from the cache;
from the cache, with its file dropped from the system's page cache before each chunk; and the same
with a worker that reads ahead. They take turns with a chunk of updates each (A B A B). The ratio of
a source is the median over the rounds of

    seconds of the chunk from memory / seconds of the chunk from the source

by the wall clock, and by the processor time of the process. Use the latter on a busy machine; it
counts no waiting and no worker. Memory is VmHWM at the end - VmRSS of the bare process, from
/proc/self/status. The bare process has imported anybatch and torch and built the model. VmHWM is
the largest resident size: anonymous pages, mapped files and shared memory, without those of
workers.

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
    """Write a file with classes that follow from the inputs, and return its bytes."""
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


def read_status(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def run_part(name: str, path: str) -> None:
    """Load the data, then make as many updates as each line of the input says, and report."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mlp([WIDTH], HIDDEN)
    bare, start = read_status("VmRSS"), time.perf_counter()
    data: Any = load_parquet(path, "target", cache=True)
    inputs, targets = data.columns
    file = inputs.path
    if name == "from memory":
        inputs = inputs.rows(torch.arange(len(data)))
    send({"load_seconds": time.perf_counter() - start})
    steps = train_forever(model, (inputs, targets), workers=int("worker" in name))
    for line in sys.stdin:
        if "disk" in name:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        wall, processor = time.perf_counter(), time.process_time()
        for step in islice(steps, int(line)):
            loss = step.loss
        seconds = time.perf_counter() - wall, time.process_time() - processor
        send({"wall": seconds[0], "processor": seconds[1], "loss": loss})
    more = {"anonymous_at_end": read_status("RssAnon"), "files_at_end": read_status("RssFile")}
    send({"bare_bytes": bare, "bytes": read_status("VmHWM") - bare, **more})


def train_forever(model: nn.Module, data: Any, workers: int) -> Iterator[ab.Step]:
    """Return updates without end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = ab.Order(len(data[1]), batch_size=BATCH, seed=0)
    objective = ab.Objective(losses["cross_entropy"])
    return ab.steps(model, objective, optimizer, data, order=order, epochs=10**6, workers=workers)


def send(result: dict[str, Any]) -> None:
    """Send one line to the parent process."""
    print(json.dumps(result), flush=True)


def start(name: str, path: Path) -> subprocess.Popen[str]:
    """Start a process for a source."""
    command = [sys.executable, __file__, "--part", name, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def receive(process: subprocess.Popen[str], updates: int | None = None) -> dict[str, Any]:
    """Ask for a number of updates, if any, and receive the next line."""
    assert process.stdin is not None
    assert process.stdout is not None
    if updates is not None:
        print(updates, file=process.stdin, flush=True)
    result: dict[str, Any] = json.loads(process.stdout.readline())
    return result


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """End a process, and receive its memory."""
    assert process.stdin is not None
    process.stdin.close()
    result = receive(process)
    process.wait()
    return result


def compare(name: str, path: Path, rounds: int) -> dict[str, Any]:
    """Compare a source with memory, A B A B."""
    processes = [start("from memory", path), start(name, path)]
    loaded = [receive(process)["load_seconds"] for process in processes]
    for process in processes:
        receive(process, CHUNK)  # to warm up
    chunks = [[receive(process, CHUNK) for process in processes] for _ in range(rounds)]
    if any(memory["loss"] != other["loss"] for memory, other in chunks):
        raise AssertionError("The sources give different losses.")
    memory = [end(process) for process in processes]
    result = {"load_seconds": loaded, "memory": memory, "loss": chunks[-1][0]["loss"]}
    for clock in ("wall", "processor"):
        pairs = [[chunk[clock] for chunk in pair] for pair in chunks]
        result |= {
            f"{clock}_ratio": median(memory / other for memory, other in pairs),
            f"{clock}_examples_per_second": [
                CHUNK * BATCH / median(p) for p in zip(*pairs, strict=True)
            ],
            f"{clock}_seconds": [[round(seconds, 4) for seconds in pair] for pair in pairs],
        }
    return result


def measure(folder: Path, num_examples: int, rounds: int) -> dict[str, Any]:
    """Measure all sources."""
    path = folder / "data.parquet"
    parquet_bytes = write_parquet(path, num_examples)
    process = start("make cache", path)
    cache = receive(process) | end(process)
    result = {}
    for name in SOURCES:
        result[name] = compare(name, path, rounds)
        print(format_result(name, result[name]), flush=True)
    return {
        "parquet_bytes": parquet_bytes,
        "examples": num_examples,
        "network": f"{WIDTH}-{HIDDEN[0]}-{HIDDEN[1]}-{CLASSES}, B={BATCH}",
        "chunk_updates": CHUNK,
        "to_reach": TO_REACH,
        "make cache": cache,
        "of pairs (from memory, the source)": result,
    }


def format_result(name: str, result: dict[str, Any]) -> str:
    """Format a line of figures."""
    memory, other = (each["bytes"] / 1e9 for each in result["memory"])
    return (
        f"{name}: {result['wall_ratio']:.3f} of the throughput from memory by the wall clock, "
        f"{result['processor_ratio']:.3f} by processor time, to reach {TO_REACH['ratio']}; "
        f"{other:.3f} GB above the bare process, from memory {memory:.3f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the raw result")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part:
        run_part(*args.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.examples, args.rounds)
    cache = result["make cache"]
    print(
        f"make cache: {cache['load_seconds']:.1f} s, {cache['bytes'] / 1e9:.3f} GB above the bare "
        f"process, to stay below {TO_REACH['memory_bytes'] / 1e9:.0f} GB"
    )
    if args.write:
        print(write("larger_than_memory", result))


if __name__ == "__main__":
    main()
