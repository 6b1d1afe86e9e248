"""Commands and scripts that `torture.py` strikes, and the final contents of their runs.

Each is tiny: a softmax regression on 40 rows, 6 or 9 updates, a checkpoint every 3.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anybatch.recipe.results import verify_run
from anybatch.runs.ledger_files import read_ledger
from anybatch.runs.records import read_records
from torture_forks import fork

__all__ = ["KILLS", "SIGNALS", "TARGETS", "Target", "contents", "prepare"]

KILLS = ("kill", "half")
FAULTS = ("EIO", "ENOSPC")
SIGNALS = ("SIGTERM", "SIGINT")
WRITING = (*KILLS, *FAULTS, *SIGNALS)
EVERY = (*WRITING, "reading")

RECIPE = """
[model]
name = "softmax_regression"
args = { inputs = [2], classes = 2 }
[data]
name = "csv"
args = { path = "rows.csv", target = "y" }
validation = 0.2
[objective]
loss = "cross_entropy"
[optimizer]
name = "sgd"
lr = 0.1
args = { momentum = 0.9 }
[stop]
metric = "loss"
patience = 5
[batch]
size = 8
[run]
epochs = 2
threads = 1
bitwise = true
"""

SCRIPT = """
import random
import numpy as np
import torch
import torch.nn.functional as F
import anybatch as ab

torch.manual_seed(1), np.random.seed(2), random.seed(3)
torch.set_num_threads(1)
own = torch.Generator().manual_seed(OWN)
x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
y = (x.sum(1) > 0).long()
model = torch.nn.Linear(2, 2)

def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

for step in ab.steps(
    model,
    ab.Objective(losses),
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    (x, y),
    order=ab.Order(40, batch_size=20, seed=0),
    epochs=2,
    run=ab.Run("run", checkpoint_every=2),
    bitwise=True,
):
    noise = torch.randn(2) + np.random.normal() + random.gauss(0, 1)
    with torch.no_grad():
        model.bias += 0.01 * (noise + DRAW)
"""


@dataclass(frozen=True)
class Target:
    """Command or script to strike, in a folder that other commands prepared."""

    argv: list[str]
    actions: tuple[str, ...]
    before: list[str] | None = None
    again: tuple[list[str], ...] = ()  # one of these must continue; none: `argv`
    only: str = ""  # strike only calls whose names contain this
    makes: str | None = None  # a file that it writes


TRAIN = ["train", "recipe.toml", "--out", "run"]
OBSERVED = [*TRAIN, "--set", "observe.norms=true"]
TRACKED = [*TRAIN, "--set", "track.to=['tensorboard']"]
RESUME = ["resume", "run"]
LONGER = [*RESUME, "--set", "run.epochs=3"]

TARGETS = {
    "train": Target(TRAIN, WRITING, again=(RESUME, TRAIN)),
    "resume": Target(LONGER, EVERY, before=TRAIN),
    "ledger": Target(LONGER, (*KILLS, *FAULTS), before=OBSERVED, only="/run/ledger"),
    "tracked": Target(TRACKED, (*KILLS, *FAULTS), again=(RESUME, TRACKED), only="/run/tensorboard"),
    "script": Target(["noisy.py"], (*KILLS, "ENOSPC")),
    "export": Target(["export", "run", "--out", "weights"], WRITING, before=TRAIN, makes="weights"),
    "explain": Target(["explain", "run", "--out", "page"], WRITING, before=TRAIN, makes="page"),
    "verify": Target(["verify", "run"], EVERY, before=TRAIN),
    "evaluate": Target(["evaluate", "run"], EVERY, before=TRAIN),
    "data": Target(OBSERVED, (), again=(RESUME, OBSERVED)),  # see `torture_data.py`
    "control": Target(["own.py"], ("kill",)),  # draws from a generator outside the run
}


def prepare(folder: Path, target: Target) -> None:
    """Make the folder of a target."""
    folder.mkdir()
    chance = random.Random(1)
    rows = [(chance.gauss(0, 1), chance.gauss(0, 1)) for _ in range(40)]
    text = "".join(f"{a:.4f},{b:.4f},{int(a + b > 0)}\n" for a, b in rows)
    (folder / "rows.csv").write_text("a,b,y\n" + text)
    (folder / "recipe.toml").write_text(RECIPE)
    for name, draw in (("noisy.py", "0"), ("own.py", "torch.randn(2, generator=own)")):
        (folder / name).write_text(SCRIPT.replace("DRAW", draw).replace("OWN", "4"))
    if target.before is not None:
        ended = fork(folder, target.before)
        assert ended.code == 0, ended


def contents(folder: Path, target: Target) -> dict[str, Any]:
    """Return the contents of a finished run, without its sessions."""
    verified = verify_run(folder / "run")
    result = {name: verified.get(name) for name in ("step", "digest", "ok", "error")}
    result["records"] = [
        {name: row.get(name) for name in ("kind", "step", "loss", "averages", "metrics", "best")}
        for row in read_records(folder / "run" / "records.jsonl")
        if row["kind"] != "session"
    ]
    if (folder / "run" / "ledger").exists():
        result["ledger"] = {name: c.tolist() for name, c in read_ledger(folder / "run").items()}
    if target.makes is not None:
        file = folder / target.makes
        result["file"] = len(file.read_bytes()) if file.exists() else None
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    checkpoint = re.compile(r"run/checkpoints/step-\d{12}($|/)")
    result["checkpoints"] = [name for name in names if checkpoint.match(name)]
    # A continued run has other ledger files with the same rows, and more event files.
    others = [n for n in names if not n.startswith(("run/ledger/", "run/tensorboard/"))]
    result["names"] = [name for name in others if not checkpoint.match(name)]
    return result
