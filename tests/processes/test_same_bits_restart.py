"""A restart by torchrun goes on from the newest checkpoint that verifies, and each rank reads its
share alone.

Once, rank 1 of 2 damages the newest checkpoint by a flipped bit, and is killed. Oracles: the
SHA-256 of all state after the same recipe in one process, and the ids of the order itself. Control:
another seed has another digest.
"""

import subprocess
import sys

import pytest

from anybatch.recipe.build import build
from anybatch.recipe.files import read_recipe
from anybatch.runs import checkpoints
from command_line import run_command, write_module, write_recipe
from small_training import rows

# 480 examples to train on in 10 updates, each of 6 grains; rank 1 has 3 of them. What is read is
# noted by start and rank.
MODULE = """
import os, signal
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn

calls = 0
START, RANK = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("RANK")

class Noted(torch.utils.data.Dataset):
    inputs = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 600

    def __getitem__(self, i):
        with Path(f"read-{START}-{RANK}").open("a") as file:
            print(int(i), file=file)
        return self.inputs[i], self.inputs[i, :3].argmax()

def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))

def losses(model, batch):
    global calls
    calls += model.training
    if (START, RANK, calls) == ("0", "1", 16):  # within the sixth update
        file = Path("run/checkpoints/step-000000000004/model.pt")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc_per_node=2", "--max-restarts=1"),
]


@pytest.fixture(scope="module")
def restart_run(tmp_path_factory):
    """Kill and damage a run, resume it, and return its folder and the command's output."""
    folder = tmp_path_factory.mktemp("restarted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_module(folder, "restarted", MODULE)
        path = write_recipe(
            folder,
            model={"name": "restarted:network"},
            data={"name": "restarted:Noted", "held_out": 0.2},
            objective={"loss": "restarted:losses", "grain": 8},
            optimizer={"args": {"momentum": 0.9}, "lr": 0.1},
            batch={"size": 48},
            run={"epochs": 1, "threads": 1, "bitwise": True, "checkpoint_every": 2},
        )
        command = [*TORCHRUN, "-m", "anybatch", "train", path, "--out", "run", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        for name, seed in (("alone", 0), ("other", 1)):
            run_command("train", path, "--out", name, "--set", f"run.seed={seed}")
        yield folder, done.stderr
        sys.modules.pop("restarted", None)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(restart_run):
    folder, results = restart_run
    first, second = (row for row in rows(folder / "run", "session") if "ranks" in row)
    assert (first["step"], second["step"], second["ranks"]) == (0, 2, 2)
    [reason] = second["refused"]
    assert "step-000000000004" in reason
    assert "model.pt: byte changed" in reason
    assert "continuing from an older checkpoint" in results
    assert "moved a damaged checkpoint aside" in results


def test_it_ends_in_the_bits_of_one_process(restart_run):
    folder, _ = restart_run
    run, alone, other = (
        checkpoints.find_newest(folder / name / "checkpoints").checkpoint
        for name in ("run", "alone", "other")
    )
    assert run.step == alone.step == other.step == 10
    assert run.digest == alone.digest
    assert run.digest != other.digest  # the control


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_reads_its_share_of_what_is_left_and_no_more(restart_run, rank):
    folder, _ = restart_run
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        order = build(read_recipe(folder / "recipe.toml"), allow_code=True).order
    batches = [order.indices(step).tolist() for step in range(2, 10)]
    share = slice(24 * rank, 24 * rank + 24)  # of 48
    ids = list(map(int, (folder / f"read-1-{rank}").read_text().split()))
    to_train = {i for batch in batches for i in batch}
    expected = sorted(i for batch in batches for i in batch[share])
    # Before the updates the fingerprint reads a sample, whose size depends on the time it takes.
    read = [i for i in ids if i in to_train]
    assert sorted(read[-len(expected) :]) == expected
    assert len(read) - len(expected) <= 2 + 2 * 512
    assert len(to_train) == 8 * 48
