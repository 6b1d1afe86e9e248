"""`run.compare_every`: the command names the update and the parameter at which its ranks part.

A user's optimiser draws numbers of its own on one rank of four. Controls: without the draws the
same command goes through, and without `compare_every` the fault is found at the next checkpoint.
"""

import re
import sys
from pathlib import Path

import pytest

from anybatch.runs import checkpoints
from command_line import refuse, run_command, write_module, write_recipe

# A bias is moved by a hair in the fourth update.
MODULE = """
import os
import numpy as np
import torch

class Noisy(torch.optim.SGD):
    def __init__(self, params, lr, ranks):
        super().__init__(params, lr=lr)
        self.made, self.ranks = 0, ranks

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        self.made += 1
        if self.made == 4 and os.environ.get("LOCAL_RANK", "0") in self.ranks:
            bias = self.param_groups[0]["params"][1]
            bias += torch.from_numpy(np.random.default_rng().normal(0, 1e-3, bias.shape)).float()
"""
RUN = {"threads": 1, "bitwise": True}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "drawing", raising=False)
    write_module(tmp_path, "drawing", MODULE)


def train(ranks, **run):
    """Write a recipe of six updates, and return the arguments of its command."""
    optimizer = {"name": "drawing:Noisy", "args": {"ranks": ranks}}
    path = write_recipe(
        Path(), optimizer=optimizer, objective={"grain": 32}, run={**RUN, "epochs": 1, **run}
    )
    return "train", path, "--out", "run", "--ranks", 4


def test_the_update_the_parameter_and_the_rank_are_named():
    message = refuse(*train("2", compare_every=1))
    assert re.match(
        r"anybatch: after 4 updates the ranks have diverged at model\.\S*bias, the first of 1: "
        r"most, "
        r"ranks 0, 1 and 3 have (\w{12}), and rank 2 has (?!\1)\w{12}\. All had the same "
        r"bits after 3\. .*drawing random numbers without a key. Nothing has been check",
        message,
    ), message
    assert not Path("run/checkpoints").exists()


def test_what_has_parted_is_found_before_it_is_written_at_the_latest():
    message = refuse(*train("2", checkpoint_every=3))
    assert "after 6 updates the ranks have diverged at model." in message
    assert "same bits after 3" in message
    assert "Nothing has been checkpointed since 3 updates" in message
    assert checkpoints.find_newest(Path("run/checkpoints")).checkpoint.step == 3


def test_ranks_that_draw_nothing_of_their_own_go_through():
    """Control."""
    run_command(*train("", compare_every=1))
    assert checkpoints.find_newest(Path("run/checkpoints")).checkpoint.step == 6
