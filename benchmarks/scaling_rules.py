"""Rules that carry a rate from one batch size to another, measured: docs/scaling-rules.md.

Eleven parts, each a module of rules/ with its question; every run has one thread, two run side by
side. The raw result is written after each part, and the document and its plots once all are there.
Where Fashion-MNIST's files are missing the runs are on digits, in some minutes, and have a raw
result, a document and plots of their own.

    python benchmarks/scaling_rules.py [--write]
    python benchmarks/scaling_rules.py --only steps noise --write    # the other parts are kept
    python benchmarks/scaling_rules.py --only --write    # the document alone
    python benchmarks/scaling_rules.py --data digits
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import torch

from machine import RESULTS, machine, write
from rules import batches, gap, minima, noise, norms, rates, smaller, steps, tuning, warmup, worst
from rules.common import FULL
from rules.data import ALL, DATA, VARIABLE, available
from rules.verdicts import minutes

__all__ = ["PARTS", "measured", "timed"]

PARTS: dict[str, ModuleType] = {  # in this order: later parts ask what earlier ones found
    "rates": rates,
    "tuning": tuning,
    "steps": steps,
    "gap": gap,
    "noise": noise,
    "warmup": warmup,
    "norms": norms,
    "worst": worst,
    "minima": minima,
    "batches": batches,
    "smaller": smaller,
}
NAME, PROCESSES = DATA.result, 2


def timed(part: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """One run: what it was asked, what it found, and its CPU seconds."""
    begun = time.process_time()
    found = PARTS[part].run(**job)
    return {**job, **found, "cpu_seconds": round(time.process_time() - begun, 2)}


def measured(part: str, raw: Mapping[str, Any], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """All runs of a part, in the order of its jobs; the full set, last of them, begins first."""
    begun, runs = time.perf_counter(), []
    jobs = PARTS[part].jobs(raw)
    first = sorted(range(len(jobs)), key=lambda number: jobs[number].get("size") != FULL)
    running = {number: pool.submit(timed, part, jobs[number]) for number in first}
    for number in range(len(jobs)):
        runs.append(running[number].result())
        print(f"{part}: {json.dumps(runs[-1])}", flush=True)
    cpu_seconds = sum(run["cpu_seconds"] for run in runs)
    wall_seconds = time.perf_counter() - begun
    return {"cpu_seconds": round(cpu_seconds), "wall_seconds": round(wall_seconds), "runs": runs}


def _kept(args: argparse.Namespace) -> dict[str, Any]:
    """The parts of the result file that are to stay."""
    file = RESULTS / f"{NAME}.json"
    if args.only is None or not file.exists():
        return {}
    found = json.loads(file.read_text())
    mixes = args.write and args.only  # the document alone comes from what is there
    if mixes and {**found["machine"], "git": None} != {**machine(), "git": None}:
        raise SystemExit(f"{file} was made on another machine, or by other versions: run all.")
    return {part: found[part] for part in PARTS if part in found and part not in args.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts alone")
    parser.add_argument("--write", action="store_true", help="keep the result, and the document")
    parser.add_argument("--data", choices=ALL, help="default: what is there")
    args = parser.parse_args()
    data = args.data or (DATA.name if args.only == [] else available())
    if data != DATA.name:  # the parts have their sizes from when they were imported
        again = [sys.executable, *sys.argv, "--data", data]
        os.execve(sys.executable, again, os.environ | {VARIABLE: data})
    torch.set_num_threads(1)
    raw = _kept(args)
    spawned = get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawned, torch.set_num_threads, (1,)) as pool:
        for part in PARTS:
            if args.only is not None and part not in args.only:
                continue
            raw[part] = measured(part, raw, pool)
            if args.write:
                parts = {name: raw[name] for name in PARTS if name in raw}
                in_all = zip(("cpu", "wall"), minutes(raw), strict=True)
                spent = {kind: round(value, 1) for kind, value in in_all}
                write(NAME, {"data": DATA.name, "minutes": spent, **parts})
    cpu, wall = minutes(raw)
    print(f"{', '.join(raw)}: {cpu:.1f} CPU minutes, {wall:.1f} minutes", flush=True)
    if args.write and len(raw) == len(PARTS):
        from rules.document.sections import publish  # it reads what was written

        publish(json.loads((RESULTS / f"{NAME}.json").read_text()))


if __name__ == "__main__":
    main()
