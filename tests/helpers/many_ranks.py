"""Trainings on 3 and 8 ranks, by every reduction: see test_same_bits_reductions.py.

Float32; 41 examples in batches of 18, 18 and 5, in grains of 2, so that 8 ranks hold 9 grains, and
some hold none of the last batch; numbers of several orders of magnitude, as in `bitwise_training`.
"""

import pickle
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch import distributed
from anybatch.gradient.passes import Accumulator
from anybatch.gradient.tree_accumulator import TreeAccumulator
from anybatch.runs.digest import digest
from bitwise_training import BATCH, GRAIN, N, by_all_reduce, vectors

WORLDS = (3, 8)


def losses(model, batch):
    """Return losses of three groups, with counts."""
    inputs, targets, groups, counts = batch
    values = F.cross_entropy(model(inputs), targets, reduction="none")
    return ab.ExampleLosses(values * counts, counts, groups)


def terms(model, batch):
    """Two of them."""
    outputs = model(batch[0])
    return {"fit": losses(lambda _: outputs, batch), "size": outputs.square().sum(1)}


def embeddings(model, batch):
    """[B, 5]."""
    return model(batch[0])


def apart(result):
    """Couples the examples: how alike they are."""
    unit = F.normalize(result.values, dim=1)
    return (unit @ unit.T).square().mean()


def steepest(result):
    return (result.values / result.counts).square().mean().sqrt()


REDUCTIONS = {
    "Mean": (losses, ab.Mean()),
    "scaled": (losses, 0.01 * ab.Mean()),
    "Sum": (losses, ab.Sum()),
    "Max": (losses, ab.Max()),
    "TopFraction": (losses, ab.TopFraction(0.4)),
    "Tilted": (losses, ab.Tilted(0.5)),
    "GroupDRO": (losses, ab.GroupDRO(0.5)),
    "a function": (losses, steepest),
    "a function of vectors": (embeddings, apart),
    "terms": (terms, {"fit": ab.Tilted(0.5), "size": 0.01 * ab.Mean()}),
}
OPTIMIZERS = {  # as they are begun; a run does not change from one to another
    "foreach": {"foreach": True},
    "one at a time": {"foreach": False},
    "fused": {"fused": True},
}


def noisy(example, key):
    """An augmentation."""
    inputs, *rest = example
    return (inputs + 0.1 * torch.randn(inputs.shape, generator=key.generator()), *rest)


def train(group, reduction, **how):
    """SHA-256 of all that a training holds after six updates, and their losses."""
    torch.manual_seed(3)
    model = nn.Sequential(
        *(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **how)
    average = ab.Average(model, 0.9)
    example_losses, reduction_class = REDUCTIONS[reduction]
    inputs, targets = vectors(torch.Generator().manual_seed(2))
    data = (inputs, targets, torch.arange(N) % 3, 1.0 + torch.arange(N) % 4)
    history = []
    for step in ab.steps(
        model,
        ab.Objective(example_losses, reduction_class, ab.L2(1e-3), grain=GRAIN),
        optimizer,
        data,
        order=ab.Order(N, batch_size=BATCH, seed=1),
        epochs=2,
        transform=noisy,
        schedule=ab.WarmUp(ab.StepDecay(0.01, 0.5, every=30), examples=20),
        clip=ab.ClipNorm(1.0),
        state={"average": average},
        group=group,
        bitwise=True,
    ):
        average.update(model)
        history.append((step.loss, step.parts, dict(step.gradient.reduction_state)))
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    return digest(state | {"average": average.state_dict(), "seen": history})


def reduce_in_groups(group, reduction):
    """Control: by a plain all-reduce."""
    other = {"sum_over_ranks": by_all_reduce, "backward_passes": Accumulator.backward_passes}
    with mock.patch.multiple(TreeAccumulator, **other):
        return train(group, reduction)


TRAININGS = {name: partial(train, reduction=name) for name in REDUCTIONS} | {
    name: partial(train, reduction="Mean", **how) for name, how in OPTIMIZERS.items()
}


def work(group):
    """Digests by training and number of ranks, and those of the controls; by plain pickle."""
    rank, results = distributed.get_rank(group), {}
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, subgroup in groups.items():
        if rank < world:
            results |= {(name, world): training(subgroup) for name, training in TRAININGS.items()}
    results |= {("reduced", name): reduce_in_groups(groups[8], name) for name in ("Mean", "Tilted")}
    return pickle.dumps(results)
