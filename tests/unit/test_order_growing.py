"""Growing batches against a walk through the stream, one batch at a time; all is exact."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import OrderError
from anybatch.order import MAX_EXAMPLES, Order
from anybatch.order.growing import Growing
from orders_by_hand import growing
from permutation_by_hand import example_at
from properties import seeded_examples

reproducible = seeded_examples(60)


@st.composite
def growths(draw):
    """N, and sizes that rise with the examples used, some of them passed over by one batch."""
    num_examples = draw(st.integers(1, 60))
    batch_sizes = sorted(draw(st.sets(st.integers(1, num_examples), min_size=1, max_size=5)))
    begins = st.integers(1, 3 * num_examples + 5)
    count = len(batch_sizes) - 1
    later = draw(st.sets(begins, min_size=count, max_size=count))
    return num_examples, tuple(zip([0, *sorted(later)], batch_sizes, strict=True))


@reproducible
@given(growths(), st.integers(0, 2**64 - 1))
def test_batches_are_those_of_the_walk(growth, seed):
    num_examples, sizes = growth
    order = Growing(num_examples, sizes=sizes, seed=seed)
    batches = growing(num_examples, sizes, seed, epochs=5)
    assert [order.indices(step).tolist() for step in range(len(batches))] == batches
    for epochs in range(6):
        assert order.num_steps(epochs) == len(growing(num_examples, sizes, seed, epochs))


def test_the_walk_tells_a_border_from_the_next():
    sizes = ((0, 2), (4, 3), (5, 4))
    assert [len(batch) for batch in growing(10, sizes, 0, 2)] == [2, 2, 3, 4, 4, 4]
    assert [len(batch) for batch in growing(10, ((0, 2), (5, 4)), 0, 2)] == [2, 2, 2, 4, 4, 4]


def test_a_size_that_one_batch_passes_over_is_never_used():
    order = Growing(100, sizes=((0, 50), (60, 70), (90, 80), (95, 90)))
    assert [len(order.indices(step)) for step in range(4)] == [50, 50, 90, 90]
    assert [order.examples_before(step) for step in range(4)] == [0, 50, 100, 190]


@reproducible
@given(st.integers(1, 200), st.data())
def test_one_size_is_order_with_batches_that_go_on(num_examples, data):
    batch_size = data.draw(st.integers(1, num_examples))
    ours = Growing(num_examples, sizes=((0, batch_size),), seed=3)
    theirs = Order(num_examples, batch_size=batch_size, seed=3, last="carry")
    assert [ours.num_steps(epochs) for epochs in range(4)] == [
        theirs.num_steps(epochs) for epochs in range(4)
    ]
    for step in range(ours.num_steps(3)):
        assert ours.indices(step).equal(theirs.indices(step))
        assert ours.visits(step) == theirs.visits(step)
        assert ours.epoch(step) == theirs.epoch(step)


def test_batches_that_go_on_know_the_epoch_of_each_example():
    order = Growing(10, sizes=((0, 4), (6, 7)), seed=1)
    assert order.visits(1) == [0, 0, 0, 0]
    assert order.visits(2) == [0, 0, 1, 1, 1, 1, 1]
    for epoch in range(3):
        visited = [
            example
            for step in range(6)
            for example, visit in zip(order.indices(step).tolist(), order.visits(step), strict=True)
            if visit == epoch
        ]
        assert sorted(visited) == list(range(10))


def test_any_step_of_a_trillion_examples_is_at_hand():
    order = Growing(MAX_EXAMPLES, sizes=((0, 256), (10**13, 1024), (10**15, 4096)), seed=5)
    step = order.num_steps(2000) - 1
    first = order.examples_before(step)
    assert 2000 * 10**12 - 2 * 4096 < first <= 2000 * 10**12 - 4096
    batch = order.indices(step).tolist()
    assert len(batch) == 4096
    for place in (0, 1, 4095):
        assert batch[place] == example_at(first + place, 10**12, seed=5)


def test_pairs_come_as_lists_too_and_orders_are_values():
    order = Growing(np.int64(100), sizes=[[0, 8], [np.int32(50), 16]], seed=np.uint8(4))
    same = Growing(100, sizes=((0, 8), (50, 16)), seed=4)
    assert order == same == pickle.loads(pickle.dumps(order))
    assert hash(order) == hash(same)
    assert repr(order) == "Growing(num_examples=100, sizes=((0, 8), (50, 16)), seed=4)"
    assert order != Growing(100, sizes=((0, 8), (51, 16)), seed=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0. It must be at least 1"),
        ({"num_examples": 10**12 + 1}, r"at most 10\^12"),
        ({"sizes": ()}, r"sizes are \(\). They must be pairs"),
        ({"sizes": 32}, "sizes are 32. They must be pairs .*such as"),
        ({"sizes": (0, 32)}, r"sizes are \(0, 32\). They must be pairs"),
        ({"sizes": ((0, 32, 1),)}, r"must be pairs \(examples used so far, batch size"),
        ({"sizes": ((0, 0),)}, "batch size is 0. It must be at least 1.*second of a pair"),
        ({"sizes": ((0, 2.5),)}, "batch size is 2.5 of type float"),
        (
            {"sizes": ((-1, 2),)},
            "examples used so far is -1. It must be at least 0.*first of a pair",
        ),
        ({"sizes": ((10, 2),)}, "The first pair must begin at 0 examples"),
        ({"sizes": ((0, 2), (20, 4), (10, 8))}, "both numbers must rise from pair to pair"),
        ({"sizes": ((0, 2), (0, 4))}, "both numbers must rise"),
        ({"sizes": ((0, 4), (10, 2))}, "both numbers must rise.*the examples first"),
        ({"sizes": ((0, 4), (10, 101))}, "batch_size is 101. It must be at most num_examples, 100"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, r"must be less than 2\^64"),
    ],
)
def test_mistaken_arguments_are_refused_with_the_fix(arguments, message):
    with pytest.raises(OrderError, match=message):
        Growing(**{"num_examples": 100, "sizes": ((0, 32),)} | arguments)
