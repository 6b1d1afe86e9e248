"""Everything that anybatch reads: a sound input of each kind, and the call that reads it."""

import gzip
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomli_w
import torch

from anybatch.data import load_cifar10, load_csv, load_idx, load_npz, load_parquet
from anybatch.errors import CheckpointError
from anybatch.recipe.files import fingerprint_recipe, format_recipe, read_recipe
from anybatch.recipe.models import load_weights
from anybatch.runs import checkpoints
from anybatch.runs.checksums import Checksums
from anybatch.runs.ledger_files import rank_examples, read_ledger
from anybatch.runs.manifest import MANIFEST
from anybatch.runs.run import Run, read_records
from anybatch.runs.state import TrainingState
from fuzz_inputs import mutate_bytes, mutate_json, mutate_text, mutate_tree

__all__ = ["TARGETS", "Target"]

Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    share: int  # of a thousand inputs
    sound: Callable[[Path], None]  # write all files of a sound input
    files: tuple[str, ...]  # to damage
    mutate: Mutate
    read: Callable[[Path], object]
    seal: Callable[[Path], None] = lambda folder: None  # correct the checksums
    rewritten: tuple[str, ...] = ()  # files that sealing or reading changes


RECIPE: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"sizes": [2, 4, 2]}},
    "data": {"name": "csv", "args": {"path": "rows.csv", "target": "y"}, "workers": 0},
    "objective": {
        "loss": "cross_entropy",
        "reduction": {"name": "tilted", "t": 1.0},
        "penalty": [{"kind": "L2", "strength": 0.01, "on": ["*weight"]}],
    },
    "optimizer": {"name": "sgd", "lr": 0.1, "groups": [{"on": ["*bias"], "momentum": 0.5}]},
    "schedule": {"name": "step", "at": [100, 200], "warm_up": 10},
    "average": {"decay": 0.99},
    "batch": {"size": 16, "micro_batch": "auto"},
    "run": {"epochs": 1, "threads": 1, "seed": 3},
    "stop": {"metric": "loss", "patience": 2},
    "track": {"to": []},
}


def _mutate_recipe(content: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return mutate_text(content, random)
    try:
        return tomli_w.dumps(mutate_tree(RECIPE, random)).encode()
    except (TypeError, ValueError, RecursionError, UnicodeEncodeError):  # TOML has no null
        return mutate_text(content, random)


def _read_recipe(folder: Path) -> None:
    recipe = read_recipe(folder / "recipe.toml")
    format_recipe(recipe)
    fingerprint_recipe(recipe)


def _run(folder: Path) -> None:
    mark = {"format": 1, "anybatch": "0.1.0"}
    (folder / "run.json").write_text(json.dumps(mark) + "\n")
    rows: list[dict[str, Any]] = [{"kind": "session", "step": 0, "ranks": 1}]
    rows += [{"kind": "step", "step": t, "loss": 1.5, "parts": {"data": 1.5}} for t in range(3)]
    rows += [{"kind": "evaluation", "step": 2, "split": "held_out", "loss": 1.0, "metrics": {}}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


MARK: dict[str, Any] = {
    "format": 2,
    "anybatch": "0.1.0",
    "others": ["notes.txt"],
    "files": {"lock": [[0, "0" * 64]], "records.jsonl": [None, [0, "0" * 64]]},
}


def _mutate_mark(content: bytes, random: Random) -> bytes:
    """Damage a run.json of either format; the newer one gets a correct checksum again."""
    if random.random() < 0.5:
        return mutate_json(content, random)
    return _seal(mutate_tree(MARK, random))


def _read_run(folder: Path) -> None:
    try:
        checksums = Checksums.read(folder)
        checksums.find_damage(), checksums.find_foreign(), checksums.find_unchecked()
        Run(folder).close()
    finally:
        for copy in folder.glob("records.jsonl.damaged-*"):
            copy.unlink()


def _read_records(folder: Path) -> None:
    read_records(folder / "records.jsonl")
    Run(folder).close()


def _net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def _parts() -> TrainingState:
    model = _net()
    return TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), {})


def _checkpoint(folder: Path) -> None:
    state, settings = _parts().dump(), {"recipe": "0" * 64, "model": {"weight": [2, 3]}}
    checkpoints.write(folder, step=3, state=state, settings=settings)


def _read_manifest(folder: Path) -> None:
    scan = checkpoints.find_newest(folder)
    if scan.checkpoint is None:
        raise AssertionRefused(scan.explain())


PLACE = "step-000000000003"


def _read_checkpoint(folder: Path) -> None:
    scan = checkpoints.find_newest(folder)
    if scan.checkpoint is None:
        raise AssertionRefused(scan.explain())
    _parts().restore(checkpoints.load(scan.checkpoint))


class AssertionRefused(CheckpointError):
    """Refusal that `newest` returns and does not raise."""


def _mutate_manifest(content: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return mutate_text(content, random)
    body = json.loads(content)
    body.pop("sha256")
    return _seal(mutate_tree(body, random))


def _seal(body: Any) -> bytes:
    """Add the checksum of a manifest, in the format that its module describes."""

    def canonical(value: Any) -> bytes:
        text = json.dumps(value, sort_keys=True, indent=1) + "\n"
        return text.encode("utf8", "surrogatepass")

    if not isinstance(body, dict):
        return canonical(body)
    try:
        return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})
    except TypeError:
        return canonical(list(body))


def _reseal(folder: Path) -> None:
    place = folder / PLACE
    body = json.loads((place / MANIFEST).read_bytes())
    body.pop("sha256")
    for name in body["files"]:
        content = (place / name).read_bytes()
        body["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (place / MANIFEST).write_bytes(_seal(body))


def _mutate_pickle(content: bytes, random: Random) -> bytes:
    """Damage a file of torch.save, or one of the files in its archive."""
    if random.random() < 0.4:
        return mutate_bytes(content, random)
    archive = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(archive, "w") as new:
        member = random.choice(
            [n for n in old.namelist() if n.endswith(".pkl")] * 3 + old.namelist()
        )
        for name in old.namelist():
            inner = old.read(name)
            new.writestr(name, mutate_bytes(inner, random) if name == member else inner)
    return archive.getvalue()


def _read_state(folder: Path) -> None:
    """Restore a sound checkpoint with odd values in its state."""
    random = Random((folder / "odd").read_bytes())
    if (folder / "odd").read_bytes() == b"0" * 8:
        return _parts().restore(_parts().dump())
    odd = (torch.zeros(0), torch.ones(3, 3), torch.tensor(1), (), ("a",), 10**30, "x", 1.5, [], {})
    odd += (None, True, float("nan"), torch.zeros(3, dtype=torch.complex64), [torch.ones(2)])
    _parts().restore(mutate_tree(_parts().dump(), random, odd))


def _idx(folder: Path) -> None:
    images = np.arange(5 * 4 * 4, dtype=np.uint8)
    head = struct.pack(">HBBIII", 0, 8, 3, 5, 4, 4)
    (folder / "images").write_bytes(head + images.tobytes())
    packed = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 5) + bytes(range(5)), mtime=0)
    (folder / "labels").write_bytes(packed)


def _cifar(folder: Path) -> None:
    rows = b"".join(bytes([i]) + bytes(3072) for i in range(2))
    (folder / "test_batch.bin").write_bytes(rows)


TABLE = 'x1,x2,w,y\n1.5,2,1,0\n-3e2,"4",0.5,1\n0.25,7,2,0\n'


def _csv(folder: Path) -> None:
    (folder / "rows.csv").write_text(TABLE)
    (folder / "rows.csv.gz").write_bytes(gzip.compress(TABLE.encode("utf-16"), mtime=0))


def _mutate_table(content: bytes, random: Random) -> bytes:
    is_packed = content.startswith(b"\x1f\x8b")
    return mutate_bytes(content, random) if is_packed else mutate_text(content, random)


def _read_table(folder: Path) -> None:
    for name in ("rows.csv", "rows.csv.gz"):
        load_csv(str(folder / name), "y", weights="w")


def _npz(folder: Path) -> None:
    inputs, targets = np.eye(4, dtype=np.float32), np.arange(4)
    np.savez_compressed(folder / "rows.npz", inputs=inputs, targets=targets)


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "w": [1.0, 2.0, 0.5], "y": [0, 1, 0]}
    parquet.write_table(pyarrow.table(columns), folder / "rows.parquet")


def _ledger(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (folder / "ledger").mkdir()
    (folder / "run.json").write_text('{"format": 1}')  # no checksums: the file itself is read
    columns = {"step": [0, 0, 1], "epoch": [0, 0, 0], "example": [3, 1, 2]}
    table = pyarrow.table({**columns, "loss": [0.5, 1.0, 2.0], "norm": [1.0, 0.1, 0.2]})
    file = "ledger/steps-000000000000-000000000002.parquet"
    parquet.write_table(table, folder / file)


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(_net().state_dict(), folder / "model.safetensors")


LEDGER = "ledger/steps-000000000000-000000000002.parquet"
STATE = tuple(f"{PLACE}/{name}.pt" for name in ("model", "optimizer"))


def _odd(folder: Path) -> None:
    (folder / "odd").write_bytes(b"0" * 8)


def _draw(content: bytes, random: Random) -> bytes:
    return random.randbytes(8)


TARGETS = (
    Target("recipe", 150, lambda f: (f / "recipe.toml").write_text(tomli_w.dumps(RECIPE)) and None,
           ("recipe.toml",), _mutate_recipe, _read_recipe),
    Target("run.json", 120, _run, ("run.json",), _mutate_mark, _read_run,
           rewritten=("records.jsonl",)),
    Target("records", 180, _run, ("records.jsonl",), mutate_text, _read_records,
           rewritten=("run.json",)),
    Target("manifest", 120, _checkpoint, (f"{PLACE}/{MANIFEST}",), _mutate_manifest,
           _read_manifest),
    Target("checkpoint", 40, _checkpoint, STATE, _mutate_pickle, _read_checkpoint, _reseal,
           (f"{PLACE}/{MANIFEST}",)),
    Target("state", 40, _odd, ("odd",), _draw, _read_state),
    Target("idx", 100, _idx, ("images", "labels"), mutate_bytes,
           lambda f: load_idx(str(f / "images"), str(f / "labels"))),
    Target("cifar10", 40, _cifar, ("test_batch.bin",), mutate_bytes,
           lambda f: load_cifar10(str(f), "test")),
    Target("csv", 120, _csv, ("rows.csv", "rows.csv.gz"), _mutate_table, _read_table),
    Target("npz", 20, _npz, ("rows.npz",), mutate_bytes, lambda f: load_npz(str(f / "rows.npz"))),
    Target("parquet", 20, _parquet, ("rows.parquet",), mutate_bytes,
           lambda f: load_parquet(str(f / "rows.parquet"), "y", weights="w")),
    Target("ledger", 15, _ledger, (LEDGER,), mutate_bytes,
           lambda f: rank_examples(read_ledger(f), "norm", 5)),
    Target("safetensors", 35, _safetensors, ("model.safetensors",), mutate_bytes,
           lambda f: load_weights(_net(), str(f / "model.safetensors"))),
)  # fmt: skip
