"""Trainings of models in shards, by `fully_shard`: see test_fully_sharded.py.

Those of test_bitwise.py: float32, batches of 18, 18 and 5 in grains of 2, so that ranks have
different numbers of grains, and at four ranks one of them none in the last batch.
"""

import copy
import pickle

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import anybatch as ab
import bitwise_training as plain
from anybatch import distributed
from anybatch.distributed import fsdp
from anybatch.gradient.fsdp import ShardedAccumulator
from anybatch.runs.digest import digest
from test_gradient_ranks import SCENARIOS, SEED, STEP, problem_of, share_of
from test_gradient_ranks import WORLDS as SHARES

WORLDS = (1, 2, 3, 4)


def in_shards(model, group):
    """Each layer of a sequence is a unit, and the model with what is left another."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in getattr(model, "blocks", model):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(
    group, model, optimizer, reduction, *, shard=True, run=None, stop=None, **options
):
    """Six updates: the whole of what the first rank then holds, and the losses."""
    make, data = plain.MODELS[model]
    torch.manual_seed(3)
    network = make()
    if shard:
        in_shards(network, group)
    training = plain.OPTIMIZERS[optimizer](network.parameters())
    objective = ab.Objective(
        plain.losses, plain.REDUCTIONS[reduction], ab.L2(1e-3), grain=plain.GRAIN
    )
    order = ab.Order(plain.N, batch_size=plain.BATCH, seed=1)
    columns = data(torch.Generator().manual_seed(2))
    average = ab.Average(network, 0.9)
    how = {"epochs": 2, "group": group, "run": run, "clip": ab.ClipNorm(0.5)} | options
    history = []
    for step in ab.steps(
        network, objective, training, columns, order=order, state={"average": average}, **how
    ):
        average.update(network)
        history.append(step.loss)
        if step.step + 1 == stop:
            step.save()
            break
    evaluated = ab.evaluate(network, objective, columns, micro_batch=7, group=group)
    state = {
        "model": dict(network.state_dict()),
        "optimizer": training.state_dict(),
        "average": average.state_dict(),
    }
    return fsdp.gather_state(state, group), tuple(history), evaluated.loss


CASES = (
    ("MLP", "SGD", "one pass"),
    ("CNN with BatchNorm", "AdamW", "two passes"),
    ("GPT with dropout", "AdamW", "one pass"),
)


def train_case(group, case, **options):
    """Digest of all that a bitwise training leaves, and its losses."""
    state, losses, evaluated = train_sharded(group, *case, bitwise=True, **options)
    return digest(state) if distributed.get_rank(group) == 0 else None, losses, evaluated


def run_controls(group):
    local = ShardedAccumulator.combine
    try:
        ShardedAccumulator.combine = by_rank
        return train_case(group, CASES[0])
    finally:
        ShardedAccumulator.combine = local


def by_rank(accumulator, unit, rows):
    """Control: each rank's grains one after the other, and then the ranks."""
    nodes = accumulator._nodes.setdefault(unit, [])
    nodes.append(rows.clone())
    accumulator._passes_of_unit[unit] += 1
    return torch.stack(nodes).sum(0).sum(0)


def gradients(group, name):
    """Compute gradient, loss and norm of a batch, by the scenarios of test_gradient_ranks.py."""
    problem, scheme, tell = problem_of(name)
    *_, shares, micro_batches = SCENARIOS[name]
    rank, world = distributed.get_rank(group), distributed.get_num_ranks(group)
    model = fully_shard(copy.deepcopy(problem.model), mesh=DeviceMesh.from_group(group, "cpu"))
    objective = ab.Objective(
        lambda model, batch: scheme.pack(tell(model, batch)),
        scheme.reduction,
        ab.L2(0.1, on="*weight*"),
        grain=problem.grain,
    )
    result = ab.batch_gradient(
        model,
        objective,
        share_of(problem.batch, shares[world], rank),
        key=ab.Key(SEED, STEP),
        layout=ab.Layout(micro_batches[rank]),
        clip=ab.ClipNorm(0.5),
        group=group,
    )
    slices = [p.grad.to_local().numel() for p in model.parameters()]
    whole = torch.cat([fsdp.gather_tensor(p.grad).flatten() for p in model.parameters()])
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"gradient": whole, "loss": result.loss, "norm": result.norm, "buffers": buffers} | {
        "slices": sum(slices)
    }


def drawing(group):
    """Use a model that turns out to draw while it runs: sharded, one rank without an example."""

    def losses(model, batch):
        return nn.functional.dropout(model(batch[0]), 0.5).square().sum(1)

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    share = (torch.arange(36.0).double().view(12, 3),)
    if group is not None:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
        share = share_of(share, (3, 0, 9), distributed.get_rank(group))
    objective = ab.Objective(losses, grain=3)
    ab.batch_gradient(model, objective, share, key=ab.Key(SEED, STEP), group=group)
    return torch.cat([fsdp.gather_tensor(p.grad).flatten() for p in model.parameters()])


def run_own_backward(group):
    """Compute torch's own backward pass after an update of the library, and without one."""

    def left(*, after):
        torch.manual_seed(0)
        model = fully_shard(nn.Linear(3, 4), mesh=DeviceMesh.from_group(group, "cpu"))
        inputs = torch.arange(12.0).view(4, 3)[distributed.get_rank(group) :]
        objective = ab.Objective(lambda model, batch: model(batch[0]).sum(1))
        if after:
            ab.batch_gradient(model, objective, (inputs,), group=group)
            model.zero_grad()
        model(inputs).sum().backward()
        return torch.cat([fsdp.gather_tensor(p.grad).flatten() for p in model.parameters()])

    return left(after=True), left(after=False)


class Choosy(nn.Module):
    """Goes through a layer twice for even numbers, and never for odd ones."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.layer(self.layer(x)) + self.bias if x[0, 0] % 2 == 0 else x + self.bias


def update(ranks, model=None, *, shard=fully_shard, mesh=None, **options):
    model = nn.Sequential(nn.Linear(3, 2)) if model is None else model
    shard(model, mesh=mesh or DeviceMesh.from_group(ranks, "cpu"))
    objective = ab.Objective(lambda model, batch: model(batch[0]).square().sum(1), grain=1)
    share = (torch.arange(12.0).reshape(4, 3)[2 * distributed.get_rank(ranks) :][:2],)
    return ab.batch_gradient(model, objective, share, **({"group": ranks} | options))


def first_alone(model, mesh):
    fully_shard(model[0], mesh=mesh)


def layer_alone(model, mesh):
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def optimize(group, **options):
    model = nn.Linear(3, 2)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1)
    objective = ab.Objective(lambda model, batch: model(batch[0]).sum(1), grain=1)
    data, order = (torch.ones(4, 3),), ab.Order(4, batch_size=2, seed=0)
    list(ab.steps(model, objective, optimizer, data, order=order, epochs=1, group=group, **options))


class ByNorm(torch.optim.SGD):
    """Looks at the whole of a parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / p.grad.norm())


MISTAKES = {  # on two ranks
    "no group": lambda group: update(group, group=None),
    "other ranks": lambda group: update(
        group, mesh=DeviceMesh("cpu", [distributed.get_rank(group)])
    ),
    "a layer alone": lambda group: update(
        group, nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), shard=first_alone
    ),
    "narrow": lambda group: update(group, nn.Linear(3, 2).bfloat16()),
    "observed": lambda group: update(group, observe=ab.Observe(norms=True)),
    "each clipped": lambda group: update(group, clip=ab.ClipExamples(1.0)),
    "auto": lambda group: update(group, layout=ab.Layout("auto")),
    "in some passes": lambda group: update(group, Choosy(), shard=layer_alone, bitwise=True),
    "both": lambda group: optimize(group, shard=True),
    "no parts": lambda group: optimize(group, optimizer=ByNorm, bitwise=True),
}


def report_error(attempt, group):
    try:
        attempt(group)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def overflown(group):
    """A gradient that is not finite in one example of one rank."""

    def losses(model, batch):
        return (model(batch[0]) ** 2).sum(1).sqrt()  # of 0: no derivative

    model = nn.Linear(3, 2, bias=False)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    inputs = torch.ones(2, 3) if distributed.get_rank(group) == 0 else torch.zeros(2, 3)
    return ab.batch_gradient(model, ab.Objective(losses), (inputs,), group=group).is_finite


def raising(group):
    """An error of one rank, in the midst of its second part."""

    def losses(model, batch):
        if (batch[0] == 9).any():
            raise ValueError("no such word")
        return model(batch[0]).sum(1)

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for layer in (*model, model):
        fully_shard(layer, mesh=DeviceMesh.from_group(group, "cpu"))
    share = (torch.arange(12.0).reshape(4, 3)[2 * distributed.get_rank(group) :][:2],)
    ab.batch_gradient(model, ab.Objective(losses), share, layout=ab.Layout(1), group=group)


def work(folder, group):
    """All of it, on groups of 1, 2, 3 and 4 ranks; by plain pickle."""
    rank, results = distributed.get_rank(group), {}
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, local in groups.items():
        if rank < world:
            results |= {(case, world): train_case(local, case) for case in CASES}
            if world in SHARES:
                results |= {(name, world): gradients(local, name) for name in SCENARIOS}
    results["control"] = run_controls(group)
    for world, stop, shard in ((3, 2, True), (2, 3, False), (4, 5, True), (2, None, True)):
        if rank < world:
            run = ab.Run(folder / "resumed", group=groups[world])
            results["resumed"] = train_case(
                groups[world], CASES[2], run=run, stop=stop, shard=shard
            )
        dist.barrier()
    if rank < 2:
        results["own backward"] = run_own_backward(groups[2])
        results["overflown"] = overflown(groups[2])
    if rank < 3:
        results["drawing"] = drawing(groups[3])
    for name, attempt in MISTAKES.items():
        if rank < 2:
            results[name] = report_error(attempt, groups[2])
    return pickle.dumps(results)
