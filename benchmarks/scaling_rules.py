"""Measure the rules that convert a rate to another batch size, for docs/scaling-rules.md.

There are eleven parts; each is a module of rules/ with one question. Every training has one thread,
and two run at a time. The raw result is written after each part. The tables and plots of the
document are written once all parts are there; its prose is written by hand, and tests compare it
with the raw result. Where Fashion-MNIST's files are missing, the data are digits, for some minutes,
with their own raw result, document and plots.

    python benchmarks/scaling_rules.py [--write]
    python benchmarks/scaling_rules.py --only steps noise --write    # the other parts stay
    python benchmarks/scaling_rules.py --only --write    # only tables and plots
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
from rules import (
    batches,
    gap,
    minima,
    noise,
    norms,
    rates,
    smaller,
    steps,
    tuning,
    warmup,
    worst,
)
from rules.common import FULL
from rules.data import ALL, DATA, VARIABLE, find_data
from rules.document import publish
from rules.verdicts import sum_minutes

__all__ = ["PARTS", "run_part", "time_job"]

PARTS: dict[str, ModuleType] = {  # in this order: later parts use results of earlier ones
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


def time_job(part: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job, and return its arguments, its result and its CPU seconds."""
    start = time.process_time()
    result = PARTS[part].run_job(**job)
    return {**job, **result, "cpu_seconds": round(time.process_time() - start, 2)}


def run_part(part: str, raw: Mapping[str, Any], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Run all jobs of a part, the slowest (of the full set) first; results are in list order."""
    start, runs = time.perf_counter(), []
    jobs = PARTS[part].list_jobs(raw)
    first = sorted(range(len(jobs)), key=lambda number: jobs[number].get("size") != FULL)
    running = {number: pool.submit(time_job, part, jobs[number]) for number in first}
    for number in range(len(jobs)):
        runs.append(running[number].result())
        print(f"{part}: {json.dumps(runs[-1])}", flush=True)
    cpu_seconds = sum(run["cpu_seconds"] for run in runs)
    wall_seconds = time.perf_counter() - start
    return {"cpu_seconds": round(cpu_seconds), "wall_seconds": round(wall_seconds), "runs": runs}


def _read_other_parts(args: argparse.Namespace) -> dict[str, Any]:
    """Read the parts of the result file that do not run again."""
    file = RESULTS / f"{NAME}.json"
    if args.only is None or not file.exists():
        return {}
    result = json.loads(file.read_text())
    mixes = args.write and args.only
    if mixes and {**result["machine"], "git": None} != {**machine(), "git": None}:
        raise SystemExit(f"{file} comes from another machine or other versions. Run all parts.")
    return {part: result[part] for part in PARTS if part in result and part not in args.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, help="only these parts")
    parser.add_argument("--write", action="store_true", help="write the result and the document")
    parser.add_argument("--data", choices=ALL, help="default: Fashion-MNIST if installed")
    args = parser.parse_args()
    data = args.data or (DATA.name if args.only == [] else find_data())
    if data != DATA.name:  # the parts set their sizes when they are imported
        again = [sys.executable, *sys.argv, "--data", data]
        os.execve(sys.executable, again, os.environ | {VARIABLE: data})
    torch.set_num_threads(1)
    raw = _read_other_parts(args)
    spawned = get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawned, torch.set_num_threads, (1,)) as pool:
        for part in PARTS:
            if args.only is not None and part not in args.only:
                continue
            raw[part] = run_part(part, raw, pool)
            if args.write:
                parts = {name: raw[name] for name in PARTS if name in raw}
                cpu, wall = sum_minutes(raw)
                minutes = {"cpu": round(cpu, 1), "wall": round(wall, 1)}
                write(NAME, {"data": DATA.name, "minutes": minutes, **parts})
    cpu, wall = sum_minutes(raw)
    print(f"{', '.join(raw)}: {cpu:.1f} CPU minutes, {wall:.1f} minutes", flush=True)
    if args.write and len(raw) == len(PARTS):
        publish(json.loads((RESULTS / f"{NAME}.json").read_text()))


if __name__ == "__main__":
    main()
