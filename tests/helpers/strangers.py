"""Files of a stranger, each with a program that would leave a mark if anything ran it."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "CODE_RAN"  # written into the folder of the test
TABLE = "x1,x2,y\n" + "".join(f"{i % 7}.5,{i % 3},{i % 2}\n" for i in range(40))
RECIPE: dict[str, Any] = {
    "model": {"name": "softmax_regression", "args": {"inputs": [2], "classes": 2}},
    "data": {"name": "csv", "args": {"path": "rows.csv", "target": "y"}},
    "objective": {"loss": "cross_entropy"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "batch": {"size": 16},
    "run": {"epochs": 1, "threads": 1},
}


def marking(folder: Path) -> str:
    """A line of Python that leaves the mark."""
    return f"open({str(folder / MARK)!r}, 'w').close()\n"


def write(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A table and a recipe for it; `changes` by "section.key"."""
    import tomli_w

    tree = json.loads(json.dumps(RECIPE))
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    (folder / "rows.csv").write_text(TABLE)
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    return folder / "recipe.toml"


def anybatch(
    folder: Path, *arguments: object, module: bool = True, seconds: float = 120
) -> tuple[int, str, str]:
    """Run the command line in a process of its own, in that folder: exit code, stdout, stderr."""
    start = ["-m", "anybatch"] if module else ["-c", "from anybatch.cli import main; main()"]
    ended = subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def run_refused(folder: Path, *arguments: object, seconds: float = 120) -> str:
    """See that a command ends with exit code 2 and one message; the message."""
    code, _, message = anybatch(folder, *arguments, seconds=seconds)
    assert "Traceback" not in message
    assert code == 2, message
    assert message.startswith("anybatch: ")
    assert message.count("anybatch: ") == 1
    return message


def reseal(path: Path, name: str, content: object) -> None:
    """Put an object into a file of a checkpoint, and make the checksums right again."""
    import torch

    from anybatch.runs.manifest import MANIFEST, StoredFile, format_manifest, verify

    checkpoint = verify(path)
    torch.save({"x": content}, path / name)
    data = (path / name).read_bytes()
    ours = StoredFile(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    files = tuple(ours if file.name == name else file for file in checkpoint.files)
    (path / MANIFEST).write_bytes(format_manifest(dataclasses.replace(checkpoint, files=files)))
    verify(path)  # the control: the checksums are right
