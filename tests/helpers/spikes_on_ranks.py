"""A training with a spike, on ranks; see test_spikes_ranks.py."""

import pickle

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import anybatch as ab
from anybatch import distributed
from anybatch.distributed import fsdp

N, BATCH, BAD = 400, 11, 7
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :3].argmax(1)
X[BAD] *= 60
Y[BAD] = (Y[BAD] + 1) % 3


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(group, spikes, run=None, *, in_shards=False, grain=None):
    """Train; return each spike in words, and the weights."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    if in_shards:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = ab.Order(N, batch_size=BATCH, seed=1)
    how = {"group": group, "spikes": spikes, "run": run, "order": order, "epochs": 3}
    if run is not None:
        how["observe"] = ab.Observe(norms=True)
    loop = ab.steps(model, ab.Objective(losses, grain=grain), optimizer, (X, Y), **how)
    texts = [str(step.spike) for step in loop if step.spike is not None]
    whole = [fsdp.gather_tensor(p.detach()) for p in model.parameters()]
    return texts, torch.cat([p.flatten() for p in whole])


def work(folder, group):
    """Return what this rank has found, with and without the watch."""
    rank = distributed.get_rank(group)
    watch = ab.SpikeWatch(factor=3.0)
    results = train(group, watch), train(group, None), train(group, watch, folder / "run")
    shards = train(group, watch, in_shards=True), train(group, None, in_shards=True)
    results = (*results, shards, train(group, watch, grain=BATCH))  # one rank has each whole batch
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(results))
