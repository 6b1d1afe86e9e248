"""Tests run on one thread a process, so that they take the same time on a busy machine. Ctrl-C
interrupts them, also where they were started in the background, in which a shell has it ignored.
The longest files begin first, so that no process is left with one of them at the end."""

import signal

import pytest
import torch

LONGEST = (
    "documents",
    "training_kill",
    "elastic",
    "fully_sharded",
    "compare_stops",
    "recipe_zoo",
    "cli_ranks",
)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else 99)
