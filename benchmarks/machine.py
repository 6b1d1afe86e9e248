"""Machine of a measurement, and raw result files."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anybatch.runs.environment import describe_environment

__all__ = ["RESULTS", "machine", "use_one_core", "write"]

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return processor, versions and threads."""
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = {row.partition(":")[2].strip() for row in rows if row.startswith("model name")}
    return {
        "processor": ", ".join(sorted(models)) or platform.processor(),
        **describe_environment(RESULTS),
    }


@contextmanager
def use_one_core() -> Iterator[None]:
    """Run this process with one thread, on one core where the system has a call for it."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a raw result to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path
