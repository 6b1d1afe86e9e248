"""Keyed splits: every example in one part, each class in proportion, the same for a seed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.data import OrderWithin, load_digits, split
from anybatch.errors import DataError
from anybatch.order import Order, OrderProtocol
from properties import seeded_examples


@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=60),
    st.floats(0.05, 0.95),
    st.integers(0, 10),
    st.booleans(),
)
@seeded_examples(40)
def test_every_example_is_in_exactly_one_part(
    targets: list[int], held_out: float, seed: int, stratify: bool
) -> None:
    classes = torch.tensor(targets)
    sizes = [len(targets)] if not stratify else np.bincount(targets).tolist()
    expected = sum(round(held_out * size) for size in sizes)
    if expected in (0, len(targets)):
        with pytest.raises(DataError, match=r"None may be empty"):
            split(classes, held_out, seed=seed, stratify=stratify)
        return
    parts = split(classes, held_out, seed=seed, stratify=stratify)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(targets)))
    assert len(parts.held_out) == expected
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


def test_a_fifth_of_each_class_of_the_digits_is_held_out() -> None:
    targets = load_digits().targets
    parts = split(targets, 0.2, seed=3)
    counts = [np.bincount(targets[part], minlength=10) for part in (parts.held_out, targets >= 0)]
    np.testing.assert_array_equal(counts[0], np.round(0.2 * counts[1]))
    plain = split(targets, 0.2, seed=3, stratify=False)  # control: chance is not in proportion
    assert np.bincount(targets[plain.held_out], minlength=10).tolist() != counts[0].tolist()


def test_data_sorted_by_class_are_no_trap() -> None:
    parts = split(torch.arange(100) // 10, 0.2, stratify=True)
    assert np.bincount(torch.arange(100)[parts.held_out] // 10).tolist() == [2] * 10


@pytest.mark.slow
def test_another_seed_is_another_split_and_the_same_one_the_same_in_any_process() -> None:
    targets = torch.arange(100) % 5
    first, other = split(targets, 0.3, seed=0), split(targets, 0.3, seed=1)
    assert first.held_out.tolist() != other.held_out.tolist()
    code = (
        "import torch\nfrom anybatch.data import split\n"
        "print(split(torch.arange(100) % 5, 0.3, seed=0).held_out.tolist())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{first.held_out.tolist()}\n"


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_none_is_refused(held_out: float) -> None:
    with pytest.raises(DataError, match=r"The first must be between 0 and 1"):
        split(torch.arange(10) % 2, held_out)


def test_an_order_within_a_part_has_the_ids_of_the_whole() -> None:
    ids = torch.tensor([3, 5, 8, 13, 21, 34, 55])
    inner = Order(7, batch_size=3, seed=4)
    order = OrderWithin(inner, ids)
    assert isinstance(order, OrderProtocol)
    for step in range(6):
        assert order.indices(step).tolist() == [int(ids[i]) for i in inner.indices(step)]
    examples = (order.seed, order.num_steps(2), order.epoch(3), order.examples_before(4))
    assert examples == (4, 6, 1, 10)
