"""A small state, and checkpoints of it."""

import torch

from anybatch.runs.checkpoints import write

SETTINGS = {"seed": 0, "order": {"batch_size": 32, "sizes": [1, 2.5, None]}}


def state(value=1.0):
    momentum = {0: {"momentum": torch.full((2,), -value), "step": 3}}
    return {
        "model": {"weight": torch.full((2, 3), value), "bias": torch.zeros(())},
        "optimizer": {"state": momentum, "lr": 0.1, "betas": (0.9, 0.99)},
    }


def small(folder, step=7, value=1.0, **options):
    return write(folder, step=step, state=state(value), settings=SETTINGS, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())
