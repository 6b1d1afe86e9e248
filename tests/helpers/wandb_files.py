"""Reads what Weights & Biases leaves offline, by its file format alone.

A file is a header of 7 bytes, then LevelDB's log: blocks of 32 KiB, in which each piece of a record
has a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7


def read_log(file: Path) -> list[tuple[int, dict[str, float]]]:
    """Each row of a run's history: its step, and its numbers by name."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            values = {name: json.loads(item.value_json) for name, item in items.items()}
            numbers = {name: value for name, value in values.items() if not name.startswith("_")}
            rows.append((record.history.step.num, numbers))
    return rows


def records(content: bytes) -> Iterator[bytes]:
    """Read the records of a file; a record that a crash cut off does not count."""
    assert content[:4] == b":W&B"
    place, whole = HEADER, b""
    while place + HEADER <= len(content):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += HEADER
        whole += content[place : place + length]
        place += length
        if kind in (1, 4):
            yield whole
            whole = b""
