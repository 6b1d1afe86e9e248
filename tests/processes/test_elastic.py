"""A run goes on while machines go and come, and ends in the bits of one process.

Three machines, each with a torchrun of its own, in network namespaces or else on loopback. Two
begin; one is cut off amid the training; a third joins. Oracle: the SHA-256 of all state after the
same recipe in one process. Control: another seed has another one.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from anybatch.runs import checkpoints
from command_line import run_command, write_module, write_recipe
from machines import Machine, in_namespaces, on_loopback, why_no_namespaces
from small_training import rows

# While there is a file "slow" a process makes some updates fast, so that there is a checkpoint, and
# then takes 2 s or more for each, so that the run does not end before a busy machine has come.
MODULE = """
import time
from pathlib import Path
import torch.nn.functional as F
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 10))

calls = 0

def losses(model, batch):
    global calls
    calls += model.training
    if model.training and Path("slow").exists():
        time.sleep(0.1 if calls < 20 else 1)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
EPOCHS = 20  # of 6 updates
SECONDS = 240.0  # for each thing to come about, on a busy machine

# A machine that is silent for 8 s is given up; who comes within 2 s of the first takes part.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=8,last_call_timeout=2,join_timeout=300"
NO_NAMESPACES = why_no_namespaces()
NETWORKS = [
    pytest.param(
        in_namespaces,
        id="namespaces",
        marks=pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES)),
    ),
    pytest.param(
        on_loopback,
        id="loopback",
        marks=pytest.mark.skipif(
            NO_NAMESPACES is None and "ANYBATCH_TORTURE" not in os.environ,
            reason="namespaces test more; with ANYBATCH_TORTURE=1 loopback is tested too",
        ),
    ),
]


def recipe(**run: object) -> Path:
    return write_recipe(
        Path(),
        model={"name": "elastic:network"},
        objective={"loss": "elastic:losses", "grain": 64},
        optimizer={"args": {"momentum": 0.9}, "lr": 0.1},
        run={"epochs": EPOCHS, "threads": 1, "bitwise": True, "checkpoint_every": 2, **run},
    )


def torchrun(machine: Machine, host: Machine, port: int, patience: int) -> list[str]:
    is_host = "true" if machine is host else "false"
    return [
        # A machine that joins later finds no store otherwise (torch 2.13).
        *("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={host.address}:{port}", "--rdzv-id=elastic"),
        *(f"--rdzv-conf={RENDEZVOUS},is_host={is_host}", f"--local-addr={machine.address}"),
        *("--max-restarts=5", "--monitor-interval=0.2"),
        *("-m", "anybatch", "train", "recipe.toml", "--out", "run", "--json"),
        *("--patience", str(patience)),
    ]


def free_port() -> int:
    with socket.socket() as result:
        result.bind(("", 0))
        return int(result.getsockname()[1])


def newest(run: str = "run") -> checkpoints.Checkpoint | None:
    return checkpoints.find_newest(Path(run, "checkpoints")).checkpoint


def sessions() -> list[dict[str, Any]]:
    """A row for each start."""
    if not Path("run", "records.jsonl").exists():
        return []
    return [row for row in rows(Path("run"), "session") if "ranks" in row]


def wait_for(ranks: int) -> int:
    """Until so many have trained as far as a checkpoint of their own; its step."""
    deadline = time.monotonic() + SECONDS
    while True:
        last, now = sessions()[-1:], newest()
        if last and last[0]["ranks"] == ranks and now is not None and now.step > last[0]["step"]:
            return now.step
        results = {file.name: file.read_text()[-3000:] for file in Path().glob("output-*")}
        assert time.monotonic() < deadline, f"no {ranks} ranks: {results}"
        time.sleep(0.1)


def goes_and_comes(
    network: Callable[[], AbstractContextManager[list[Machine]]],
    leave: Callable[[Machine], None],
    patience: int,
) -> str:
    """Two machines train, one leaves, and a third joins; what the first has printed."""
    write_module(Path().absolute(), "elastic", MODULE)
    recipe()
    Path("slow").touch()
    with network() as (first, second, third):
        port = free_port()

        def begin(machine: Machine) -> None:
            command = torchrun(machine, first, port, patience)
            machine.start(command, Path(f"output-{machine.address}"))

        begin(first)
        begin(second)
        steps = [wait_for(2)]
        leave(second)
        steps.append(wait_for(1))
        begin(third)
        wait_for(2)
        Path("slow").unlink()
        assert [one.started[0].wait(SECONDS) for one in (first, third)] == [0, 0]
        check_starts(steps)
        return Path(f"output-{first.address}").read_text()


def check_starts(steps: list[int]) -> None:
    """See that two, then one, then two have trained, and each from the newest checkpoint."""
    result = sessions()
    assert result[0]["step"] == 0
    assert [row["refused"] for row in result] == [[]] * len(result)
    changes = [row for before, row in pairwise(result) if row["ranks"] != before["ranks"]]
    fewer, more = changes[-2:]
    assert (fewer["ranks"], more["ranks"]) == (1, 2)
    assert fewer["step"] >= steps[0]
    assert more["step"] >= steps[1]


def check_bits() -> None:
    """See that the run has ended as one process does."""
    for name, seed in (("alone", 0), ("other", 1)):
        run_command("train", "recipe.toml", "--out", name, "--set", f"run.seed={seed}")
    ended, alone, other = (newest(name) for name in ("run", "alone", "other"))
    assert ended is not None
    assert alone is not None
    assert other is not None
    assert (ended.step, ended.digest) == (alone.step, alone.digest)
    assert other.digest != alone.digest  # the control


@pytest.mark.parametrize("network", NETWORKS)
def test_machines_go_and_come_and_the_run_ends_in_the_bits_of_one_process(
    network: Callable[[], AbstractContextManager[list[Machine]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    results = goes_and_comes(network, Machine.switch_off, patience=120)
    lost_rank = r"rank 1 is gone: killed, or its machine|rank 0, or its torchrun, is gone"
    assert re.search(lost_rank, results)
    check_bits()


@pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))
@pytest.mark.skipif(
    "ANYBATCH_TORTURE" not in os.environ, reason="takes a minute: ANYBATCH_TORTURE=1 runs it"
)
def test_a_machine_that_is_unplugged_is_given_up_after_the_patience_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = goes_and_comes(in_namespaces, Machine.unplug, patience=15)
    silent = "rank 1 has not come to the others, which waited 15 s, and is stopped or out of reach"
    assert silent in results
    stopped = Path("output-10.77.0.2").read_text()
    assert "rank 0, or its torchrun, is gone or out of reach" in stopped
    check_bits()
