"""A rank that hangs, stops or dies is named, with the cause, within the stated time.

The others wait as long as their patience, then `CALL_SECONDS` at most; the one that hangs is ended
then too, at most `GRACE_SECONDS` later. Control: a rank that is slow, but within the patience.
"""

import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.multiprocessing as mp

import hanging_training
from anybatch.distributed import RankError
from anybatch.distributed.failures import CALL_SECONDS, GRACE_SECONDS
from anybatch.training.launch import launch
from command_line import refuse, write_module, write_recipe
from hanging_training import CULPRIT

RANKS = 4
PATIENCE = timedelta(seconds=5)
BUSY = 60.0  # seconds by which a busy machine may be late, starting the ranks included

HERE = re.escape(hanging_training.__file__)
MISSED = rf"rank {CULPRIT} has not come to the others, which waited 5 s"
TOLD = {
    "body": rf"{MISSED}: it was at {HERE}:\d+, in sleep_for_ever",
    "data": rf"rank 3 has not come to the others, which waited 5 s: it was at {HERE}:\d+, in "
    r"sleep_for_ever",
    "stopped": rf"{MISSED}, and is stopped or out of reach",
    "killed": rf"rank {CULPRIT} is gone: killed, or its machine is out of reach",
}
LAUNCHED = {**TOLD, "killed": rf"rank {CULPRIT} was killed by SIGKILL \(is memory short\?\)"}


def launch_scenario(name: str, folder: Path, patience: timedelta = PATIENCE) -> list[str]:
    work = partial(hanging_training.work, name, folder)
    return launch(work, RANKS, imports=["hanging_training"], patience=patience)


@pytest.mark.parametrize("name", TOLD)
def test_the_others_stop_in_time_and_name_the_rank_and_the_cause(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=rf"^{LAUNCHED[name]}\. All 4 ranks must train"):
        launch_scenario(name, tmp_path)
    waited = PATIENCE.total_seconds() + CALL_SECONDS
    assert time.monotonic() - start < waited + GRACE_SECONDS + BUSY
    culprit = 3 if name == "data" else CULPRIT
    results = {int(path.name.split("-")[1]): path.read_text() for path in tmp_path.iterdir()}
    assert results.keys() == {0, 1, 2, 3} - {culprit}
    for text in results.values():  # the same on all that are left
        seconds, words = text.split(maxsplit=1)
        assert re.match(rf"{TOLD[name]}. The collective failed with: ", words)
        assert float(seconds) < waited + BUSY
        assert float(seconds) > (0 if name == "killed" else PATIENCE.total_seconds())


def test_a_rank_that_is_slow_within_the_patience_is_waited_for(tmp_path: Path) -> None:
    patience = timedelta(seconds=BUSY)
    assert launch_scenario("slow", tmp_path, patience) == ["to the end"] * RANKS  # the control
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_comes_too_late_is_told_so_too(tmp_path: Path) -> None:
    work = partial(hanging_training.late, tmp_path, PATIENCE.total_seconds() + 0.5)
    results = launch(work, RANKS, patience=PATIENCE)
    late = rf"rank {CULPRIT} (came too late|has not come) to the others, which waited 5 s"
    assert [bool(re.match(late, text)) for text in results] == [True] * RANKS, results


def test_a_rank_that_leaves_alone_is_named_with_its_error() -> None:
    with pytest.raises(RankError, match=rf"^rank {CULPRIT} has ended before the others by OSError"):
        launch(hanging_training.left, RANKS)


@pytest.mark.parametrize("name", ["body", "killed"])
def test_a_group_of_ones_own_is_told_too(name: str, tmp_path: Path) -> None:
    arguments = (tmp_path, name, 3, PATIENCE)
    started = mp.start_processes(
        hanging_training.make_own_group, arguments, 3, join=False, start_method="forkserver"
    )
    for process in started.processes[:CULPRIT]:
        process.join(300)
    started.processes[CULPRIT].kill()
    for rank in range(CULPRIT):
        assert re.match(TOLD[name], (tmp_path / f"own-{rank}").read_text())


MODULE = """
import os, time
import torch.nn.functional as F
from torch import nn

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def losses(model, batch):
    while os.environ.get("LOCAL_RANK") == "1":
        time.sleep(1)
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def test_the_command_names_the_rank_that_hangs_and_the_place_in_the_users_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path, "hanging", MODULE)
    sections = {"model": {"name": "hanging:network"}, "objective": {"loss": "hanging:losses"}}
    path = write_recipe(tmp_path, **sections)
    message = refuse("train", path, "--out", "run", "--ranks", 2, "--patience", 4)
    where = re.escape(str(tmp_path / "hanging.py"))
    assert re.match(
        rf"anybatch: rank 1 has not come to the others, which waited 4 s: it was at {where}:\d+, "
        r"in losses\. All 2 ranks must train to the end",
        message,
    )
