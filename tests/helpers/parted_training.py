"""Trainings whose ranks part, by a flipped bit or by what one of them does; see test_agreement.py.

A perceptron in float64, 12 updates in batches of 8, 8 and 7.
"""

import pickle
import time

import torch
import torch.distributed as dist
from torch import nn

import anybatch as ab
import training_by_hand as by_hand
from anybatch import distributed

AT = 3  # the fault comes in the body of the update after so many


class Counter:
    """An object of the user's."""

    def __init__(self):
        self.seen = torch.zeros(2)

    def state_dict(self):
        return {"seen": self.seen, "names": ["a", "b"]}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def flip(tensor):
    """Flip the lowest bit of the first element."""
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int64).bitwise_xor_(1)


def weight(model, optimizer, counter):
    flip(model[3].weight)


def moment(model, optimizer, counter):
    flip(optimizer.state[model[0].bias]["exp_avg_sq"])


def user(model, optimizer, counter):
    counter.seen += 1


def noise(model, optimizer, counter):
    """Draw without a key: each rank draws other numbers."""
    torch.manual_seed(distributed.get_rank(dist.group.WORLD))
    with torch.no_grad():
        model[0].weight.add_(1e-3 * torch.rand(model[0].weight.shape, dtype=torch.float64))


def nothing(model, optimizer, counter):
    pass


def train_parted(group, fault, ranks, *, run=None, also=lambda step: None, **options):
    """Adam, with a fault in the update after `AT` on some ranks; the losses."""
    model, counter, losses = by_hand.network(), Counter(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if run is not None:
        run = ab.Run(run, checkpoint_every=2, group=group)

    def body(step):
        losses.append(step.loss)
        if step.step == AT and distributed.get_rank(group) in ranks:
            fault(model, optimizer, counter)
        also(step)

    options |= {"state": {"counter": counter}, "run": run, "group": group}
    by_hand.run(model, optimizer, body=body, **options)
    return losses


def save_on_one(group, folder):
    def also(step):
        if step.step == 1 and distributed.get_rank(group) == 0:
            step.save()

    return train_parted(group, nothing, (), run=folder, also=also)


def save_while_one_fails(group, folder):
    def also(step):
        if step.step == 0:
            if distributed.get_rank(group) == 1:
                raise ZeroDivisionError("in the body")
            step.save()

    return train_parted(group, nothing, (), run=folder, also=also)


def with_threads_of_its_own(group):
    before = torch.get_num_threads()
    torch.set_num_threads(before + (distributed.get_rank(group) == 2))
    try:
        return train_parted(group, nothing, (), bitwise=True, objective=GRAINS)
    finally:
        torch.set_num_threads(before)


class Unpool(nn.Module):
    """Writes to places that may be the same, in any order as far as torch knows."""

    def forward(self, x):
        places = torch.zeros(*x.shape, 1, 1, dtype=torch.long)
        return nn.functional.max_unpool2d(x[..., None, None], places, 1).flatten(1)


def without_a_kernel(group):
    model = nn.Sequential(by_hand.network(), Unpool())
    by_hand.run(model, by_hand.sgd(model), group=group, bitwise=True, objective=GRAINS)


GRAINS = ab.Objective(by_hand.example_losses, grain=4)
ALONE, BOTH = (2,), (1, 2)
SCENARIOS = {  # on four ranks
    "weight": lambda group, folder: train_parted(group, weight, ALONE, compare_every=1),
    "moment": lambda group, folder: train_parted(group, moment, ALONE, compare_every=1),
    "user": lambda group, folder: train_parted(group, user, ALONE, compare_every=1),
    "two of four": lambda group, folder: train_parted(group, weight, BOTH, compare_every=1),
    "noise": lambda group, folder: train_parted(group, noise, range(4), compare_every=1),
    "checkpoint": lambda group, folder: train_parted(
        group, moment, ALONE, run=folder / "checkpoint"
    ),
    "none": lambda group, folder: train_parted(
        group, nothing, ALONE, run=folder / "none", compare_every=1
    ),
    "not compared": lambda group, folder: train_parted(group, weight, ALONE),
    "saved by one": lambda group, folder: save_on_one(group, folder / "one"),
    "failed": lambda group, folder: save_while_one_fails(group, folder / "failed"),
    "threads": lambda group, folder: with_threads_of_its_own(group),
    "no kernel": lambda group, folder: without_a_kernel(group),
    "count": lambda group, folder: train_parted(group, nothing, (), compare_every=0),
}


def report(group, attempt, folder):
    """Run an attempt on this rank; return its result, or type, text and notes of its error."""
    start = time.perf_counter()
    try:
        ended = attempt(group, folder)
    except Exception as error:
        ended = (type(error).__name__, str(error), getattr(error, "__notes__", []))
    return ended, time.perf_counter() - start


def work(folder, group):
    """All scenarios on four ranks, and the first on two of them; by plain pickle."""
    result = {name: report(group, attempt, folder) for name, attempt in SCENARIOS.items()}
    pair = dist.new_group([1, 2])
    if distributed.get_rank(group) in (1, 2):
        result["pair"] = report(
            pair, lambda subgroup, _: train_parted(subgroup, weight, (1,), compare_every=3), ""
        )
    return pickle.dumps(result)
