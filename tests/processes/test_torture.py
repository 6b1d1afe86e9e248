"""A small part of `make torture`: commands struck at calls that change a run's folder.

The oracle is a run that nothing struck: its digest, records and names of files. The control is a
script with draws that its run does not know of, which must end otherwise once it was killed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "torture.py"
RECORD = ROOT / "benchmarks" / "results" / "torture.json"

needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="calls are counted on Linux, by a library that a C compiler makes",
)


def torture(*arguments: str) -> dict[str, Any]:
    """Run some of the torture; its summary."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": source},
    )
    summary: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert (ended.returncode == 0) == (summary["as expected"] == summary["runs"]), ended.stderr
    assert summary["as expected"] == summary["runs"], ended.stdout
    return summary


@needs_a_compiler
def test_commands_that_are_struck_end_as_they_should_and_their_runs_go_on() -> None:
    summary = torture("--runs", "30")
    assert summary["runs"] == 35
    assert summary["by target"]["control"] == 5
    assert len(summary["by action"]) > 4
    assert len(summary["by call"]) > 4


@needs_a_compiler
def test_a_run_goes_on_without_a_tracker_that_the_disk_refuses() -> None:
    pytest.importorskip("tensorboard")
    summary = torture("--target", "tracked", "--action", "EIO")
    assert summary["by target"] == {"tracked": summary["runs"]}
    assert summary["by call"]["mkdir"] == 1  # of the tracker's folder, without which the run ends


def test_the_record_names_each_run_that_ended_otherwise_than_expected() -> None:
    record = json.loads(RECORD.read_text())
    summary, runs = record["summary"], record["runs"]
    wrong = [run for run in runs if "\n" in run and not run.startswith("control")]
    assert len(runs) == summary["runs"] == summary["as expected"] + len(wrong)
    assert Counter(run.split()[0] for run in wrong) == summary["wrong"]
