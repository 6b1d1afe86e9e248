"""A cache of rows is whole or not there, made once, found damaged, and small in memory.

What was written into the Parquet file must come out, whatever happened in between.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from anybatch.data import load_parquet, parquet
from anybatch.data.stored import Stored
from anybatch.errors import DataError
from small_caches import folder_of, numbers, read_cached, rows_of, write_source


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are made some rows at a time."""
    monkeypatch.setattr(parquet, "PIECE_BYTES", 100)


def test_a_cache_is_made_once_for_each_question_and_again_for_other_data(tmp_path: Path) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((5, 2)), z=np.arange(5.0))
    first = read_cached(path)
    product = (folder_of(path) / "rows.bin").stat().st_mtime_ns
    assert torch.equal(rows_of(read_cached(path)), rows_of(first))
    assert (folder_of(path) / "rows.bin").stat().st_mtime_ns == product
    other = load_parquet(path, "y", "z", cache=f"{path}.cache")
    assert isinstance(other, Stored)
    assert rows_of(other).flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rows_of(read_cached(path)), rows_of(first))
    assert len([*Path(f"{path}.cache").glob("*/manifest.json")]) == 2

    write_source(tmp_path / "t.parquet", numbers((5, 2)) + 1, z=np.arange(5.0))
    with pytest.raises(DataError, match=r"has changed in row 0"):
        rows_of(first) if read_cached(path) else None  # never another file's rows unseen
    assert torch.equal(rows_of(read_cached(path)), torch.from_numpy(numbers((5, 2)) + 1))
    assert len([*Path(f"{path}.cache").glob("*/manifest.json")]) == 2  # the old one is gone


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    inputs = numbers((20, 2))
    inputs[17, 1] = np.inf
    path = write_source(tmp_path / "t.parquet", inputs)
    with pytest.raises(DataError, match=r"inputs hold inf in example 17. All must be finite"):
        read_cached(path)
    assert [each.suffix for each in Path(f"{path}.cache").iterdir()] == [".lock"]


def test_files_reach_the_disk_before_their_manifest_and_that_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        size = path.stat().st_size if path.is_file() else ""
        calls.append(f"fsync {path.relative_to(tmp_path)} {size}".replace(name(), "NAME"))

    def rename(source: Path, target: Any) -> Any:
        calls.append(f"rename {Path(target).relative_to(tmp_path)}".replace(name(), "NAME"))
        return actual(source, target)

    def name() -> str:
        (lock,) = tmp_path.glob("t.parquet.cache/.*.lock")
        return lock.stem[1:]

    path, actual = write_source(tmp_path / "t.parquet", numbers((5, 2))), Path.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    os.mkdir(f"{path}.cache")
    examples = read_cached(path)
    sizes = {each.name: each.stat().st_size for each in examples.inputs.path.parent.iterdir()}
    partial = "t.parquet.cache/NAME.partial"
    assert calls == [
        f"fsync {partial}/rows.bin {sizes['rows.bin']}",
        f"fsync {partial}/beside.npz {sizes['beside.npz']}",
        f"fsync {partial}/manifest.json.partial {sizes['manifest.json']}",
        f"fsync {partial} ",
        "rename t.parquet.cache/NAME",
        "fsync t.parquet.cache ",
    ]


KILLED = """
import os, pathlib, signal, sys
import numpy as np, torch
from anybatch.data import cache, load_parquet, parquet

parquet.PIECE_BYTES = 100
folder, path = sys.argv[1:]

def killed(event):
    count = 0
    def count_calls(call):
        def wrapper(*arguments, **named):
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)
        return wrapper
    os.fsync, os.mkdir, os.unlink = map(count_calls, (os.fsync, os.mkdir, os.unlink))
    pathlib.Path.rename, pathlib.Path.replace = map(
        count_calls, (pathlib.Path.rename, pathlib.Path.replace)
    )
    cache.compute_checksums, np.savez = count_calls(cache.compute_checksums), count_calls(np.savez)
    os.rmdir = count_calls(os.rmdir)
    load_parquet(path, "y", "x", cache=place)

for event in range(1, 1000):
    place = f"{folder}/{event}"
    os.utime(path, ns=(0, event))  # a cache of the file as it was before is out of date
    load_parquet(path, "y", "x", cache=place)
    os.utime(path, ns=(0, event + 1))
    child = os.fork()
    if child == 0:
        killed(event)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    left = sorted(each.name for each in pathlib.Path(place).iterdir() if each.suffix != ".lock")
    found = load_parquet(path, "y", "x", cache=place)
    assert (found.inputs.rows(torch.arange(20)) == torch.arange(40.0).reshape(20, 2)).all()
    after = [each.suffix for each in pathlib.Path(place).iterdir()]
    assert sorted(after) == ["", ".lock"], after
    if ended == 0:
        break  # it has come to its end: no such event
print(event)
"""


def test_a_process_killed_at_any_moment_leaves_a_cache_or_none(tmp_path: Path) -> None:
    path = write_source(tmp_path / "t.parquet", np.arange(40.0).reshape(20, 2))
    (tmp_path / "caches").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "caches"), path]
    ended = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert int(ended.stdout) > 15  # events


def damages(content: bytes) -> Iterator[bytes]:
    """A file cut off, lengthened, emptied, and with a bit flipped here and there."""
    yield from (content[:-1], content[: len(content) // 2], b"", content + b"\0")
    for place in range(0, len(content), max(1, len(content) // 40)):
        yield content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["rows.bin", "beside.npz", "manifest.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((9, 5)), w=np.arange(9.0))
    right = read_cached(path, weights="w")
    file = folder_of(path) / name
    content = file.read_bytes()
    for damage in damages(content):
        file.write_bytes(damage)
        where = rf"{re.escape(str(file))} .* Remove the folder {re.escape(str(file.parent))}:"
        with pytest.raises(DataError, match=where):
            rows_of(read_cached(path, weights="w"))
    file.write_bytes(content)  # the control
    examples = read_cached(path, weights="w")
    assert torch.equal(rows_of(examples), rows_of(right))
    file.unlink()
    with pytest.raises(DataError, match=name):
        read_cached(path, weights="w")


def test_damage_under_a_training_is_found_when_the_row_is_read(tmp_path: Path) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((9, 5)))
    examples = read_cached(path)
    with examples.inputs.path.open("r+b") as file:
        file.seek(3 * 20 + 7)
        file.write(b"\x55")
    assert len(examples.inputs.rows(torch.tensor([0, 8, 4]))) == 3
    with pytest.raises(DataError, match=r"rows.bin has changed in row 3. The cache is damaged"):
        examples.inputs.rows(torch.tensor([0, 8, 3]))
    os.truncate(examples.inputs.path, 100)
    with pytest.raises(DataError, match=r"rows.bin cannot be read \(it ends in row 5\)"):
        examples.inputs.rows(torch.tensor([4, 5, 6]))
    examples.inputs.path.unlink()
    with pytest.raises(DataError, match=r"rows.bin cannot be read \(.*No such file"):
        examples.inputs.rows(torch.tensor([0]))


def test_two_processes_at_once_make_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_source(tmp_path / "t.parquet", numbers((30, 5)))
    product, examples = [], []

    def count_calls(*arguments: Any) -> Any:
        product.append(arguments)
        return actual(*arguments)

    actual = parquet._read_pieces
    monkeypatch.setattr(parquet, "_read_pieces", count_calls)
    threads = [
        threading.Thread(target=lambda: examples.append(read_cached(path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(product) == 1
    assert all(torch.equal(rows_of(each), rows_of(examples[0])) for each in examples)


MEMORY = """
import json, os, sys
from pathlib import Path
import numpy as np, torch
import anybatch as ab
from anybatch.data import load_parquet, parquet

torch.set_num_threads(1)
small, large = sys.argv[1:]
parquet.PIECE_BYTES = 2**20
status = lambda field: int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

class MapStyle:
    def __init__(self, rows):
        self.map = np.memmap(rows.path, rows.kind, "r", shape=(len(rows), *rows.row))
    def __len__(self): return len(self.map)
    def rows(self, ids): return torch.from_numpy(self.map[ids.numpy()])

def losses(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

def go(path, mapped):
    data = load_parquet(path, "y", "x", cache=True)
    inputs, targets = data.columns
    inputs = MapStyle(inputs) if mapped else inputs
    model = torch.nn.Linear(768, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = ab.Order(len(targets), batch_size=256, seed=0)
    for step in ab.steps(
        model, ab.Objective(losses), optimizer, (inputs, targets % 10), order=order, epochs=1
    ):
        pass

go(small, False), go(small, True)  # load what is loaded once
before, found = status("VmRSS"), []
for mapped in (False, True):  # what was most can only grow
    go(large, mapped)
    found.append((status("VmHWM") - before) * 1024)
print(found)
"""


def test_memory_stays_small_while_a_cache_is_made_and_read(tmp_path: Path) -> None:
    """60 MB within 20 MB, as 3 GB within 1 GB; what is mapped is not."""
    inputs = np.random.default_rng(0).standard_normal((20_000, 768)).astype("f4")
    size = inputs.nbytes
    column = pa.FixedSizeListArray.from_arrays(pa.array(inputs.reshape(-1)), 768)
    for name, count in (("small", 512), ("large", len(inputs))):
        table = pa.table({"x": column[:count], "y": np.arange(count)})
        pq.write_table(table, tmp_path / name, use_dictionary=False)  # one row group
    del inputs, column, table
    paths = [str(tmp_path / name) for name in ("small", "large")]
    command = [sys.executable, "-c", MEMORY, *paths]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    read, mapping = json.loads(ended.stdout)  # bytes
    assert read < size / 3
    assert mapping > size / 1.2  # the control
