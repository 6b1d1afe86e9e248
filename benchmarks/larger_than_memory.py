"""Training on 3 GB of Parquet in shuffled order: memory, and throughput against data in memory.

A file of 768 floats and a class an example is written and cached once. Then an MLP makes updates
with a keyed order over all rows, from memory and from the cache in turn (A B A B), and from the
cache once more with its file dropped from the page cache, so that rows come from the disk. Each
is a new process of one thread, and says

    examples a second, over all updates but the first few
    bytes = VmHWM at the end - VmRSS of the bare process, both of /proc/self/status

where the bare process has imported anybatch and torch and made the model, and VmHWM is the most
that was ever resident: anonymous pages, mapped files and shared memory together.

    python benchmarks/larger_than_memory.py [--write]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import anybatch as ab
from anybatch.data import load_parquet
from anybatch.zoo import losses, mlp
from machine import write

WIDTH, CLASSES, HIDDEN, BATCH = 768, 10, 512, 256
WARM_UP = 20  # updates that are not timed
ROW_GROUP = 20_000
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


def part(name: str, path: str, num_updates: int) -> dict[str, Any]:
    """What one process does: make the cache, or train "from memory", "from cache", "from disk"."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mlp([WIDTH], [HIDDEN])
    bare, begun = status("VmRSS"), time.perf_counter()
    data: Any = load_parquet(path, "target", cache=name != "from memory")
    found = {"load_seconds": time.perf_counter() - begun}
    if name == "from disk":
        with data.inputs.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if name != "make cache":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        order = ab.Order(len(data.targets), batch_size=BATCH, seed=0)
        objective = ab.Objective(losses["cross_entropy"])
        steps = ab.steps(model, objective, optimizer, data.columns, order=order, epochs=1)
        values = []
        for step in steps:
            values.append(step.loss)
            if step.step + 1 == WARM_UP:
                begun = time.perf_counter()
            if step.step + 1 == WARM_UP + num_updates:
                break
        seconds = time.perf_counter() - begun
        found |= {"examples_per_second": num_updates * BATCH / seconds, "loss": values[-1]}
    more = {"RssAnon": status("RssAnon"), "RssFile": status("RssFile")}
    return found | {"bare_bytes": bare, "bytes": status("VmHWM") - bare, **more}


def in_a_new_process(name: str, path: Path, num_updates: int) -> dict[str, Any]:
    """What `part` says there."""
    command = [sys.executable, __file__, "--part", name, str(path), "--updates", str(num_updates)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    print(f"{name}: {found}", flush=True)
    return found


def measure(folder: Path, num_examples: int, num_updates: int, rounds: int) -> dict[str, Any]:
    """All parts, and what they come to."""
    path = folder / "data.parquet"
    parquet_bytes = write_parquet(path, num_examples)
    parts = ["make cache", *["from memory", "from cache"] * rounds, *["from disk"] * rounds]
    found: dict[str, list[dict[str, Any]]] = {}
    for name in parts:
        found.setdefault(name, []).append(in_a_new_process(name, path, num_updates))
    speed = {
        name: [one["examples_per_second"] for one in ones]
        for name, ones in found.items()
        if name != "make cache"
    }
    (loss,) = {one["loss"] for ones in found.values() for one in ones if "loss" in one}  # bitwise
    pairs = zip(speed["from cache"], speed["from memory"], strict=True)
    return {
        "parquet_bytes": parquet_bytes,
        "examples": num_examples,
        "network": f"{WIDTH}-{HIDDEN}-{CLASSES}, B={BATCH}",
        "updates": num_updates,
        "loss": loss,
        "ratio": median(ours / memory for ours, memory in pairs),
        "ratio_from_disk": median(speed["from disk"]) / median(speed["from memory"]),
        "examples_per_second": {name: median(each) for name, each in speed.items()},
        "memory_bytes": {name: max(one["bytes"] for one in ones) for name, ones in found.items()},
        "to_reach": TO_REACH,
        "parts": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(part(*args.part, num_updates=args.updates)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.examples, args.updates, args.rounds)
    for name, num_bytes in result["memory_bytes"].items():
        print(f"{name}: {num_bytes / 1e9:.3f} GB above the bare process")
    print(
        f"from cache {result['ratio']:.3f} of the throughput from memory, to reach "
        f"{TO_REACH['ratio']}; from disk {result['ratio_from_disk']:.3f}"
    )
    if args.write:
        print(write("larger_than_memory", result))


if __name__ == "__main__":
    main()
