"""Train a model in shards: no rank has all of it, and any number of ranks gives the same bits.

    torchrun --nproc_per_node 2 examples/fully_sharded.py runs/shards
    anybatch verify runs/shards     # the same digest as for 1 rank, or for 3

Kill it and start it again with another number of ranks: it continues, to the same digest.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anybatch as ab
from anybatch.zoo import gpt

torch.set_num_threads(1)
dist.init_process_group("gloo")
group = dist.group.WORLD
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)  # every rank starts with the same model, and keeps its slices
model = gpt(vocabulary=32, width=32, length=16, dropout=0.1)
num_weights = sum(p.numel() for p in model.parameters())
for block in model.blocks:  # gathered together: each block, and then the rest
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # after fully_shard: over the slices
num_local = sum(p.to_local().numel() for p in model.parameters())


def example_losses(model: nn.Module, tokens: Tensor) -> ab.ExampleLosses:
    """Return the cross-entropy of each text's next tokens, and their number."""
    logits, targets = model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]
    values = F.cross_entropy(logits, targets, reduction="none").sum(1)
    return ab.ExampleLosses(values, counts=torch.full((len(tokens),), targets.shape[1]))


starts = torch.arange(96)[:, None]
texts = (starts + (1 + starts % 3) * torch.arange(17)) % 32  # each counts in steps of 1, 2 or 3
objective = ab.Objective(example_losses, grain=4)
order = ab.Order(len(texts), batch_size=24, seed=0)
run = ab.Run(sys.argv[1] if len(sys.argv) > 1 else "runs/fully-sharded", group=group)
settings = {"order": order, "epochs": 10, "run": run, "group": group, "bitwise": True}
for step in ab.steps(model, objective, optimizer, texts, **settings):
    if step.ends_epoch and dist.get_rank() == 0:
        print(f"epoch {step.epoch}  loss {step.loss:.4f}", flush=True)
if dist.get_rank() == 0:
    print(f"{num_local:,} of {num_weights:,} weights on the first rank")
dist.destroy_process_group()
