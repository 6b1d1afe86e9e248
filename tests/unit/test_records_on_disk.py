"""Rows of a run are on the disk, not only in the system's memory, once it is closed.

`os.fsync` is watched: the file that it is called for must be that of the records, with every row
in it already. Without the call a machine that loses its power loses rows that a checkpoint counts.
"""

import json
import os
from pathlib import Path

import pytest

import anybatch as ab


def test_rows_are_synced_with_all_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: dict[int, int] = {}
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    run = ab.Run(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", watch)
    for step in range(3):
        run.record({"kind": "note", "step": step})
    [file] = [
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix == ".jsonl"
    ]
    assert synced.get(file.stat().st_ino) is None  # the control: nothing was synced before
    run.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "note"] == [0, 1, 2]
    assert synced[file.stat().st_ino] == file.stat().st_size
