"""Trainings in which one rank hangs, stops, dies or fails alone; see test_hanging_rank.py."""

import os
import signal
import time

import torch
import torch.distributed as dist

import training_by_hand as by_hand
from anybatch import distributed
from anybatch.distributed import RankError

CULPRIT = 2
AT = 2  # the update


def sleep_for_ever():
    while True:
        time.sleep(1)


class Stuck(torch.utils.data.Dataset):
    """Data of which one example never comes."""

    def __len__(self):
        return by_hand.N

    def __getitem__(self, i):
        if i == int(by_hand.ORDER.indices(0)[7]):  # of 8 in the first batch, the last rank's
            sleep_for_ever()
        return tuple(column[i] for column in by_hand.data())


def train(group, body=lambda step: None, **options):
    model = by_hand.network()
    return by_hand.run(model, by_hand.sgd(model), group=group, body=body, **options)


def on_the_culprit(group, what):
    """A body of the loop in which that happens, once."""

    def body(step):
        if step.step == AT and distributed.get_rank(group) == CULPRIT:
            what()

    return body


def die(number):
    os.kill(os.getpid(), number)


def fail():
    raise OSError("a hole in the disk")


HAPPENS = {
    "body": lambda group: train(group, on_the_culprit(group, sleep_for_ever)),
    "data": lambda group: train(group, data=Stuck()),
    "stopped": lambda group: train(group, on_the_culprit(group, lambda: die(signal.SIGSTOP))),
    "killed": lambda group: train(group, on_the_culprit(group, lambda: die(signal.SIGKILL))),
    "slow": lambda group: train(group, on_the_culprit(group, lambda: time.sleep(1.5))),
}


def work(name, folder, group):
    """Let it happen; what the others are told, and how long after the update before it."""
    start = [time.monotonic()]
    try:
        HAPPENS[name](group)
    except RankError as error:
        results = folder / f"{name}-{distributed.get_rank(group)}"
        results.write_text(f"{time.monotonic() - start[0]} {error}")
        raise
    return "to the end"


def late(folder, seconds, group):
    """Let the culprit come when the others have just given up."""
    try:
        distributed.call_together(lambda: None, group)
        if distributed.get_rank(group) == CULPRIT:
            time.sleep(seconds)
        distributed.call_together(lambda: None, group)
    except RankError as error:
        return str(error)


def left(group):
    """Let the culprit leave in a way on which the others cannot agree."""
    if distributed.get_rank(group) == CULPRIT:
        raise OSError("a hole in the disk")
    try:
        distributed.call_together(lambda: None, group)
    except RankError as error:
        return str(error)


def make_own_group(rank, folder, name, ranks, timeout):
    """A script with a process group of its own, and the time limit that it has given that."""
    method = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=ranks, timeout=timeout
    )
    try:
        HAPPENS[name](dist.group.WORLD)
    except RankError as error:
        (folder / f"own-{rank}").write_text(str(error))
