"""Three tiers of tests, and what all of them need.

    tests/unit         in this process
    tests/processes    start processes: ranks, kills, commands (mark `process`)
    tests/pages        run documents, and open pages in a browser (mark `documents`)
    tests/house        rules of the source, for `make check`

`make test` leaves out `process`, `documents` and `slow`, except for tests with the mark
`smoke`: at least one real case of each promise. Of a test with `fast(n)` it runs n cases.
`make test-all` runs everything.

Tests run on one thread a process, so that they take the same time on a busy machine. Ctrl-C
interrupts them, also where they were started in the background, in which a shell ignores it. The
longest files begin first, so that no process is left with one of them at the end.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HELPERS = Path(__file__).parent / "helpers"
FOLDER_MARKS = {"processes": "process", "pages": "documents"}
LONGEST = (
    "documents",
    "training_kill",
    "elastic",
    "fully_sharded",
    "compare_stops",
    "recipe_zoo",
    "cli_ranks",
)

pytest.register_assert_rewrite(*(file.stem for file in HELPERS.glob("*.py")))
settings.register_profile("fast", max_examples=15)  # of 100: see helpers/properties.py
settings.register_profile("full", max_examples=100)
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[object, list[pytest.Item]] = {}
    for item in items:
        mark = FOLDER_MARKS.get(item.path.parent.name)
        if mark is not None:
            item.add_marker(mark)
        if item.get_closest_marker("fast") is not None:
            cases.setdefault(getattr(item, "function", item), []).append(item)
    for same in cases.values():
        mark_slow(same)
    files = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else 99)


def mark_slow(cases: list[pytest.Item]) -> None:
    """Mark all but n cases of a test as slow; the n lie evenly among them."""
    mark = cases[0].get_closest_marker("fast")
    assert mark is not None
    number = mark.args[0]
    fast = {i * len(cases) // number for i in range(number)}
    for i, item in enumerate(cases):
        if i not in fast:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _default_settings() -> Iterator[None]:
    """Put torch's global settings back: blocks of documents and tests may change them."""
    yield
    torch.set_printoptions(profile="default")
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
