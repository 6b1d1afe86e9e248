"""Trainings that ranks make together, and mistakes of one of them; see test_training_ranks.py."""

import os
import pickle
import signal
import time
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

import anybatch as ab
import small_training
import training_by_hand as by_hand
from anybatch import distributed
from anybatch.errors import RunError

WORLDS = (1, 2, 3, 4)
BEFORE_THE_KILL = 5  # updates


class Counting(torch.utils.data.Dataset):
    """Examples by index, and which of them were read."""

    def __init__(self):
        self.columns = by_hand.data()
        self.read = []

    def __len__(self):
        return by_hand.N

    def __getitem__(self, i):
        self.read.append(int(i))
        return tuple(column[i] for column in self.columns)


def plain(group, **options):
    """Momentum on a perceptron, batches of 8, 8 and 7; returns the weights and what was read."""
    model, data = by_hand.network(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    weights = by_hand.run(
        model,
        optimizer,
        data=options.pop("data", data),
        body=lambda step: losses.append(step.loss),
        group=group,
        **options,
    )
    return {"weights": weights, "losses": losses, "read": data.read}


def small(group, run=None, stop=None, body=lambda step: None, **options):
    """Everything that a checkpoint holds, in float64: batch norm and dropout in grains of 4."""
    training = small_training.start()
    training.model.double()
    training.average = small_training.Average(training.model)
    inputs, *rest = small_training.data()
    for step in training.loop(run, data=(inputs.double(), *rest), group=group, **options):
        body(step)
        if step.step + 1 == stop:
            step.save()
            break
    return {"state": vector(training.state), "losses": training.losses}


def vector(state):
    """All numbers of a nested state."""
    leaves = [torch.as_tensor(leaf) for leaf in tree_leaves(state) if leaf is not None]
    return torch.cat([leaf.double().flatten() for leaf in leaves])


class Bag(nn.Module):
    """Mean of the embeddings of a ragged sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(9, 4, dtype=torch.float64)

    def forward(self, padded):
        mask = padded.mask[..., None]
        return (self.embedding(padded.values) * mask).sum(1) / mask.sum(1)


def padded(group, workers=0):
    """Ragged sequences, padded to the longest of each micro-batch."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 6, (by_hand.N,), generator=generator).tolist()
    data = [(torch.randint(9, (n,), generator=generator), torch.tensor(n % 3)) for n in lengths]
    model = Bag()
    options = {"collate": ab.Pad(), "workers": workers, "layout": ab.Layout(2), "epochs": 1}
    weights = by_hand.run(model, by_hand.sgd(model), data=data, group=group, **options)
    return {"weights": weights}


def observe_norms(group, folder):
    """Train with a ledger of each example's norm and projection."""
    run = ab.Run(folder, group=group)
    observe = ab.Observe(norms=True, projections=16)
    return plain(group, data=by_hand.data(), run=run, observe=observe)


def evaluate_ragged(group):
    """Evaluate the objective on all data, in ragged micro-batches."""
    model, objective = by_hand.network(dropout=0.5), by_hand.OBJECTIVE
    return ab.evaluate(model, objective, by_hand.data(), micro_batch=3, group=group)


def evaluate_metrics(group):
    """Evaluate metrics of torchmetrics that are no means over examples, and one of an update."""
    if find_spec("torchmetrics") is None:
        return None
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    def losses(model, batch):
        logits = model(batch[0])
        values = nn.functional.cross_entropy(logits, batch[1], reduction="none")
        return ab.ExampleLosses(values, outputs={"predictions": logits, "targets": batch[1]})

    inputs, data = torch.linspace(-2, 2, 87).reshape(29, 3).sin(), torch.arange(29) % 4
    torch.manual_seed(0)
    metrics = {"F1": MulticlassF1Score(4), "area": MulticlassAUROC(4)}
    model, objective = nn.Linear(3, 4), ab.Objective(losses)
    how = {"metrics": metrics, "micro_batch": 3, "group": group}
    rank, num_ranks = distributed.get_rank(group), distributed.get_num_ranks(group)
    share = slice(rank * 29 // num_ranks, (rank + 1) * 29 // num_ranks)
    gradient = ab.batch_gradient(model, objective, (inputs[share], data[share]), group=group)
    metric = MulticlassF1Score(4, process_group=group)  # torchmetrics joins the shares
    metric.update(gradient.outputs["predictions"], gradient.outputs["targets"])
    return ab.evaluate(model, objective, (inputs, data), **how), metric.compute().item()


SCENARIOS = {
    "plain": plain,
    "a list": lambda group: plain(group, data=list(zip(*by_hand.data(), strict=True))),
    "fewer examples than ranks": lambda group: plain(
        group, order=ab.Order(by_hand.N, batch_size=3, seed=4), epochs=2
    ),
    "two passes": lambda group: plain(
        group, objective=ab.Objective(by_hand.example_losses, ab.Tilted(0.5))
    ),
    "small": small,
    "one grain": lambda group: small(
        group, objective=ab.Objective(small_training.example_losses, ab.GroupDRO(0.5)), epochs=1
    ),
    "padded": padded,
    "workers": lambda group: padded(group, workers=1),
    "evaluated": evaluate_ragged,
    "metrics": evaluate_metrics,
}


class Unread(torch.utils.data.Dataset):
    """Data of which one example cannot be read."""

    def __len__(self):
        return by_hand.N

    def __getitem__(self, i):
        if i == int(by_hand.ORDER.indices(0)[4]):  # of 8 in the first batch
            raise OSError("the disk has a hole")
        return tuple(column[i] for column in by_hand.data())


class Careless(torch.optim.SGD):
    """An optimiser that fails."""

    __qualname__ = "SGD"  # or the ranks would be seen to differ

    def step(self, closure=None):
        raise MemoryError("no room for momentum")


def failing_on(rank, group, error):
    """A body of the loop that raises in the second update, on one rank alone."""

    def body(step):
        if step.step == 1 and distributed.get_rank(group) == rank:
            raise error

    return body


def leaving_on(rank, group):
    for step in ab.steps(
        model := by_hand.network(),
        by_hand.OBJECTIVE,
        by_hand.sgd(model),
        by_hand.data(),
        order=by_hand.ORDER,
        epochs=1,
        group=group,
    ):
        if step.step == 1 and distributed.get_rank(group) == rank:
            break


def with_a_seed_of_its_own(group, rank):
    model = by_hand.network()
    if rank == 2:
        nn.init.ones_(model[3].bias)
    by_hand.run(model, by_hand.sgd(model), group=group)


def with_a_rate_of_its_own(group, rank):
    model = by_hand.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if rank == 1 else 0.1)
    by_hand.run(model, optimizer, group=group)


def with_an_optimizer_that_fails(group, rank):
    model = by_hand.network()
    kind = Careless if rank == 1 else torch.optim.SGD
    by_hand.run(model, kind(model.parameters(), lr=0.1), group=group)


def on_a_full_disk(group, rank, folder, what):
    """Records or checkpoints of the first rank do not reach the disk."""
    run = ab.Run(folder, group=group)

    def raise_on_write(*_, **__):
        raise RunError("the disk is full")

    if rank == 0:
        setattr(run, what, raise_on_write)
    plain(group, run=run)


MISTAKES = {
    "unread": lambda group, rank, folder: plain(group, data=Unread()),
    "body": lambda group, rank, folder: by_hand.run(
        model := by_hand.network(),
        by_hand.sgd(model),
        group=group,
        body=failing_on(1, group, ZeroDivisionError("in the body")),
    ),
    "break": lambda group, rank, folder: leaving_on(2, group),
    "weights": lambda group, rank, folder: with_a_seed_of_its_own(group, rank),
    "rate": lambda group, rank, folder: with_a_rate_of_its_own(group, rank),
    "optimizer": lambda group, rank, folder: with_an_optimizer_that_fails(group, rank),
    "records": lambda group, rank, folder: on_a_full_disk(group, rank, folder / "a", "record"),
    "checkpoint": lambda group, rank, folder: on_a_full_disk(
        group, rank, folder / "b", "write_checkpoint"
    ),
    "folder": lambda group, rank, folder: plain(group, run=folder),
    "group": lambda group, rank, folder: plain(
        group, run=ab.Run(folder / str(rank), checkpoint_every=1)
    ),
    "none": lambda group, rank, folder: plain(group, run=folder / "c"),
}


def failures(group, folder):
    """Collect the error of each mistake on this rank: type, text, notes and seconds."""
    results, rank = {}, distributed.get_rank(group)
    (folder / "no run").mkdir(parents=True, exist_ok=True)
    for name, attempt in MISTAKES.items():
        start_time = time.perf_counter()
        try:
            attempt(group, rank, folder)
            results[name] = None
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            results[name] = (
                type(error).__name__,
                str(error),
                notes,
                time.perf_counter() - start_time,
            )
    return results


def die(folder, group):
    """Train on two ranks, and kill the second in the body of an update."""

    def body(step):
        start_time[0] = time.perf_counter()
        if distributed.get_rank(group) == 1 and step.step + 1 == BEFORE_THE_KILL:
            os.kill(os.getpid(), signal.SIGKILL)

    start_time = [0.0]
    try:
        small(group, ab.Run(folder / "killed", checkpoint_every=2, group=group), body=body)
    except distributed.RankError as error:
        (folder / "survivor").write_text(f"{time.perf_counter() - start_time[0]} {error}")


def work(folder, group):
    """All scenarios, on groups of 1, 2, 3 and 4 ranks; what came of them, by plain pickle."""
    rank, results = distributed.get_rank(group), {}
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, subgroup in groups.items():
        for name, scenario in SCENARIOS.items() if rank < world else ():
            results[name, world] = scenario(subgroup)
    for left, taken_up, last in ((2, 3, 1), (1, 4, 2)):
        run = folder / f"left-at-{left}"
        for world, stop in ((left, 4), (taken_up, 7), (last, None)):
            if rank < world:
                results["resumed", left] = small(groups[world], run, stop)
            dist.barrier()
    if rank < 3:
        results["killed"] = small(groups[3], folder / "killed")
        results["observed"] = observe_norms(groups[3], folder / "observed")
        results["failures"] = failures(groups[3], folder / "failures")
    return pickle.dumps(results)
