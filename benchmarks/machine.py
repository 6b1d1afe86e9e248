"""Machine of a measurement, and raw result files."""

import json
import platform
from pathlib import Path
from typing import Any

from anybatch.runs.environment import describe_environment

__all__ = ["RESULTS", "machine", "write"]

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


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a raw result to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path
