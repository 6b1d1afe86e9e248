"""Trainers of others on two ranks, with the exact gradient.

Oracle: plain autograd in one process on the examples that the ranks have read together, in float64.
The controls are the trainers themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import anybatch as ab
import trainers_on_ranks as jobs
from trainers_on_ranks import X, Y, losses, network

HELPERS = Path(jobs.__file__).parent


def run_on_ranks(name: str, folder: Path) -> list[torch.Tensor]:
    """Run a job on two ranks; return the result of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {
        "PYTHONPATH": f"{HELPERS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [*command, jobs.__file__, name, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def distance(one, other):
    return float((one - other).norm() / other.norm())


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def train_by_hand(model, batches, lr=0.1):
    for ids in batches:
        model.zero_grad()
        F.cross_entropy(model(X[ids]), Y[ids]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    return jobs.flatten(model)


def test_pieces_on_two_ranks_have_the_gradient_of_the_batch(tmp_path):
    model = network()
    losses(model, (X[:16], Y[:16])).mean().backward()
    for outcome in run_on_ranks("pieces", tmp_path):
        assert distance(outcome, gradient_of(model)) < 1e-13


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("grains", [4, 2, 4, 2]), ("a lone example", [4, 4, 4, 1]), ("no example", [4, 5])],
)
def test_pieces_are_the_grains_of_all_ranks(tmp_path, name, sizes):
    model, total = network(0.5), sum(sizes)
    share = ab.MicroBatches(list(zip(X[:total].split(sizes), Y[:total].split(sizes), strict=True)))
    ab.batch_gradient(model, ab.Objective(losses), share, key=ab.Key(1, 0))
    for outcome in run_on_ranks(name, tmp_path):
        assert distance(outcome, gradient_of(model)) < 1e-13


def test_accelerate_with_unequal_ranks(tmp_path):
    pytest.importorskip("accelerate", reason="the accelerate extra is missing")
    expected = train_by_hand(network(), [range(9), range(9)])
    for outcome in run_on_ranks("accelerate", tmp_path):
        assert distance(outcome, expected) < 1e-13


def read_by_ranks(window: int) -> list[list[int]]:
    """List the examples of each update: even ones on rank 0, odd ones on rank 1."""
    shares = [list(range(rank, jobs.N, 2)) for rank in range(2)]
    return [
        shares[0][start : start + window] + shares[1][start : start + window]
        for start in range(0, len(shares[0]), window)
    ]


def test_lightning_with_ddp(tmp_path):
    pytest.importorskip("lightning", reason="the lightning extra is missing")
    expected = train_by_hand(network(), read_by_ranks(4))
    for outcome in run_on_ranks("lightning", tmp_path):
        assert distance(outcome, expected) < 1e-12
    for outcome in run_on_ranks("lightning itself", tmp_path):  # the control: the last window
        assert distance(outcome, expected) > 1e-4


def test_lightnings_ddp_sends_no_gradient_a_second_time(tmp_path):
    pytest.importorskip("lightning", reason="the lightning extra is missing")
    assert [int(n) for n in run_on_ranks("sent", tmp_path)] == [0, 0]
    assert all(n > 0 for n in run_on_ranks("sent by lightning itself", tmp_path))  # the control


def test_the_trainer_of_transformers_with_ddp(tmp_path):
    pytest.importorskip("accelerate", reason="the transformers extra is missing")
    from tiny_transformers import Sentences, bert, collate

    data = Sentences(20, "class")
    model = bert("SequenceClassification", num_labels=3)
    shards = [[j for i in range(0, 20, 4) for j in (i + 2 * r, i + 2 * r + 1)] for r in range(2)]
    for start in range(0, 10, 4):  # batches of 2 go to the ranks in turns
        rows = [data[i] for shard in shards for i in shard[start : start + 4]]
        batch = collate(rows)
        labels = batch.pop("labels")
        model.zero_grad()
        F.cross_entropy(model(**batch).logits, labels).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    expected = jobs.flatten(model)
    for outcome in run_on_ranks("transformers", tmp_path):
        assert distance(outcome, expected) < 1e-11
    for outcome in run_on_ranks("transformers itself", tmp_path):  # the control
        assert distance(outcome, expected) > 1e-3
