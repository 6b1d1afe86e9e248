"""Trainings whose bits ranks must agree on: see test_bitwise.py.

Float32; 41 examples in batches of 18, 18 and 5, in grains of 2, which come out even over no number
of ranks but 1 and 3; numbers of several orders of magnitude, so that orders of summation show.
"""

import pickle
from functools import partial
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import anybatch as ab
import small_training
from anybatch import distributed
from anybatch.gradient import pairwise_sum
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.tree_accumulator import TreeAccumulator
from anybatch.runs import checkpoints
from anybatch.runs.digest import digest
from anybatch.zoo import gpt

WORLDS = (1, 2, 3, 4)
N, BATCH, GRAIN = 41, 18, 2


def perceptron():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


def convolutions():
    """CNN with batch normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 5)),
    )


def transformer():
    """GPT with dropout."""
    return gpt(vocabulary=11, width=16, depth=2, heads=2, length=7, dropout=0.2)


def vectors(generator):
    inputs = torch.randn(N, 12, generator=generator) * 10.0 ** torch.arange(-3, 3).repeat(2)
    return inputs, torch.randint(5, (N,), generator=generator)


def images(generator):
    inputs, targets = torch.randn(N, 1, 4, 4, generator=generator), torch.arange(N) % 5
    return inputs, targets


def tokens(generator):
    result = torch.randint(11, (N, 8), generator=generator)
    return result[:, :-1], result[:, 1:]


def losses(model, batch):
    inputs, targets = batch
    logits = model(inputs)
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    values = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return ab.ExampleLosses(values.view_as(targets).sum(1), torch.arange(1, len(targets) + 1))


MODELS = {
    "MLP": (perceptron, vectors),
    "CNN with BatchNorm": (convolutions, images),
    "GPT with dropout": (transformer, tokens),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}
REDUCTIONS = {"one pass": ab.Mean(), "two passes": ab.TopFraction(0.4)}
MATRIX = list(product(MODELS, OPTIMIZERS, REDUCTIONS))


def train(group, model, optimizer, reduction, *, bitwise=True, run=None, stop=None, **options):
    """SHA-256 of all that a training holds after six updates, and their losses."""
    make, data = MODELS[model]
    torch.manual_seed(3)
    network = make()
    training = OPTIMIZERS[optimizer](network.parameters())
    objective = ab.Objective(losses, REDUCTIONS[reduction], ab.L2(1e-3), grain=GRAIN)
    order = ab.Order(N, batch_size=BATCH, seed=1)
    columns = data(torch.Generator().manual_seed(2))
    how = {"epochs": 2, "group": group, "bitwise": bitwise, "run": run} | options
    history = []
    for step in ab.steps(network, objective, training, columns, order=order, **how):
        history.append(step.loss)
        if step.step + 1 == stop:
            step.save()
            break
    state = {"model": dict(network.state_dict()), "optimizer": training.state_dict()}
    return digest(state), tuple(history)


def everything(group, *, bitwise=True):
    """GroupDRO, clipping, an average, an augmentation, dropout, batch norm, a schedule."""
    training = small_training.start()
    for _ in training.loop(group=group, bitwise=bitwise):
        pass
    return digest({"state": training.state, "losses": training.losses})


def train_observed(group):
    """Clip each example's gradient, and observe norms and alignment."""
    options = {"clip": ab.ClipExamples(0.5), "observe": ab.Observe(norms=True, alignment=True)}
    return train(group, "MLP", "SGD", "one pass", **options)


def narrow(group):
    """Under autocast."""
    return train(group, "MLP", "AdamW", "one pass", precision="bfloat16")


OTHERS = {"everything": everything, "observed": train_observed, "bfloat16": narrow}


def by_all_reduce(accumulator):
    """Control: each rank's own subtree, and then the ranks as torch adds them up."""
    local, none = (
        accumulator._nodes,
        [torch.zeros_like(p) for p in accumulator._parameters.values()],
    )
    assert local or accumulator._range[0] == accumulator._range[1]  # not sent before
    sums = pairwise_sum.sum_nodes(local, pairwise_sum.add_lists) if local else none
    distributed.all_reduce_sum(sums, accumulator._group)
    accumulator.sums = dict(zip(accumulator._parameters, sums, strict=True))
    accumulator._nodes = []


def controls(group):
    """Repeat the training with a plain all-reduce, and without `bitwise`."""
    other = {"sum_over_ranks": by_all_reduce, "backward_passes": Accumulator.backward_passes}
    with mock.patch.multiple(TreeAccumulator, **other):
        reduced = train(group, "MLP", "SGD", "one pass")
    return reduced, train(group, "MLP", "SGD", "one pass", bitwise=False)


def sharded(group, folder, optimizer, **options):
    """Return the digest of a run whose state is sharded."""
    run = ab.Run(folder, group=group)
    train(group, "MLP", optimizer, "one pass", run=run, **options)
    return checkpoints.find_newest(folder / "checkpoints").checkpoint.digest


def work(folder, group):
    """Digests by training and number of ranks, and of runs left and taken up; by plain pickle."""
    rank, results = distributed.get_rank(group), {}
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, local in groups.items():
        if rank < world:
            results |= {(case, world): train(local, *case) for case in MATRIX}
            results |= {(name, world): other(local) for name, other in OTHERS.items()}
    results["controls"] = controls(groups[4])
    for optimizer in OPTIMIZERS:
        local = folder / optimizer
        for world, stop in ((3, 2), (2, 4), (4, None)):
            if rank < world:
                how = {"shard": world != 2, "stop": stop}
                results["sharded", optimizer] = sharded(groups[world], local, optimizer, **how)
            dist.barrier()
    case = ("GPT with dropout", "AdamW", "two passes")
    for world, stop in ((3, 2), (4, 3), (1, 4), (2, None)):
        if rank < world:
            run = ab.Run(folder / "resumed", group=groups[world])
            results["resumed", world] = train(groups[world], *case, run=run, stop=stop)
        dist.barrier()
    return pickle.dumps(results)
