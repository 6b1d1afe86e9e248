"""Ray Train with one and two workers: `make test-ray` installs it, and runs this and its document.

Oracle: plain autograd in one process on whole batches, in float64. The control is the training of
Ray's guide, with DDP and the mean of the micro-batches' means.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="the ray extra is missing: make test-ray"
)
HELPERS = Path(__file__).parents[1] / "helpers"
RANKS = [(1, 0), (2, 0), (2, 1)]
N = 23


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Train in a fresh process, where Ray starts its own; return weights by workers and rank."""
    folder = tmp_path_factory.mktemp("ray")
    paths = [HELPERS, os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(HELPERS / "ray_training.py"), str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {(n, rank): torch.load(folder / f"{n}-{rank}.pt") for n, rank in RANKS}


def train_by_hand(num_updates):
    inputs, targets = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin(), torch.arange(N) % 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for step in range(num_updates):
        ids = ab.Order(N, batch_size=8, seed=0).indices(step)
        model.zero_grad()
        F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("cut", ["uncut", "3", "1", "auto"])
def test_workers_end_in_the_weights_of_plain_autograd(results, rank, cut):
    assert distance(results[rank][cut], train_by_hand(3)) < 1e-13


@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_the_training_of_rays_guide_ends_in_other_weights(results, rank):  # the control
    assert distance(results[rank]["ray itself"], train_by_hand(3)) > 1e-4


def test_one_worker_goes_on_with_the_run_of_two(results):
    for rank in (0, 1):
        assert distance(results[2, rank]["run"], train_by_hand(2)) < 1e-13
    assert distance(results[1, 0]["run"], train_by_hand(3)) < 1e-13
    assert distance(train_by_hand(2), train_by_hand(3)) > 1e-4  # the control
