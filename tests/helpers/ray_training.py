"""Trainings by Ray Train on one and on two workers: weights of each, for test_integrations_ray.py.

python ray_training.py FOLDER
"""

import os
import sys
from pathlib import Path

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # before ray reads them

import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import nn

import anybatch as ab

N = 23
X = torch.linspace(-2, 2, 3 * N).reshape(N, 3).double().sin()
Y = torch.arange(N) % 4
ORDER = ab.Order(N, batch_size=8, seed=0)  # batches of 8, 8 and 7
CUTS = {"uncut": None, "3": 3, "1": 1, "auto": "auto"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def flatten(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def update_by_cut(cut):
    """Make an epoch of updates in a loop of one's own, from this worker's share of each batch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"layout": ab.Layout(cut), "group": dist.group.WORLD}
    for ids in ORDER.sampler(dist.get_rank(), dist.get_world_size()):
        ab.batch_gradient(model, ab.Objective(losses), (X[ids], Y[ids]), **how)
        optimizer.step()
    return flatten(model)


def update_by_ray():
    """Make the same updates as Ray's guide does: DDP, and the mean of the micro-batches' means."""
    model = prepare_model(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids in ORDER.sampler(dist.get_rank(), dist.get_world_size()):
        optimizer.zero_grad()
        for piece in (ids[:2], ids[2:]):
            (losses(model, (X[piece], Y[piece])).mean() / 2).backward()
        optimizer.step()
    return flatten(model)


def train_with_run(folder, num_steps):
    """Train with `ab.steps`, and go on with the run in the folder if there is one."""
    model, group = network(), dist.group.WORLD
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = ab.Run(folder, checkpoint_every=1, group=group)
    how = {"order": ORDER, "steps": num_steps, "run": run, "group": group}
    for step in ab.steps(model, ab.Objective(losses), optimizer, (X, Y), **how):
        ray.train.report({"loss": step.loss})
    return flatten(model)


def work(config):
    """Save the weights of every way to train."""
    torch.set_num_threads(1)
    results = {name: update_by_cut(cut) for name, cut in CUTS.items()}
    results["ray itself"] = update_by_ray()
    results["run"] = train_with_run(config["folder"] / "run", config["num_steps"])
    torch.save(results, config["folder"] / f"{dist.get_world_size()}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for num_workers, num_steps in ((2, 2), (1, 3)):  # one worker goes on with the run of two
        TorchTrainer(
            work,
            train_loop_config={"folder": folder, "num_steps": num_steps},
            scaling_config=ScalingConfig(num_workers=num_workers),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=str(folder / "ray")),
        ).fit()
    ray.shutdown()
