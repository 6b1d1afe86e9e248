"""Order against an item-by-item oracle and brute-force counting.

Whether its shuffle is a fair one, `test_order_uniformity` asks.
"""

import pickle
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybatch.errors import AnybatchError, OrderError
from anybatch.order import MAX_EXAMPLES, Order, OrderProtocol, permutation
from permutation_by_hand import GAMMA, MASK, example_at, key_of, mix, place_of
from properties import seeded_examples

BLOCK = permutation._BLOCK


def batches_of(num_examples: int, batch_size: int, last: str, epochs: int) -> list[list[int]]:
    """Positions of each batch, by walking through the epochs one example at a time."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for position in range(epochs * num_examples):
        batch.append(position)
        end_of_epoch = (position + 1) % num_examples == 0
        if len(batch) == batch_size or (end_of_epoch and last == "keep"):
            batches.append(batch)
            batch = []
        if end_of_epoch and last == "drop":
            batch = []
    return batches


sizes = st.integers(1, 3000)
seeds = st.integers(0, MASK)
policies = st.sampled_from(["keep", "carry", "drop"])
reproducible = seeded_examples(40)


def test_the_mixer_is_splitmix64():
    # Oracle: an independent implementation, `SplittableRandom(1234567)` of Java 17.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [1234567 + r * GAMMA & MASK for r in (1, 2, 3)]
    assert [mix(state) for state in states] == outputs
    assert permutation.mix(np.array(states, np.uint64)).tolist() == outputs


@reproducible
@given(sizes | st.integers(1, MAX_EXAMPLES), seeds, st.integers(0, 10**18))
def test_every_index_is_that_of_the_oracle(num_examples, seed, position):
    order = Order(num_examples, batch_size=1, seed=seed, last="carry")
    assert order.indices(position).tolist() == [example_at(position, num_examples, seed)]


@reproducible
@given(sizes, st.integers(1, 400), seeds, policies)
def test_steps_are_the_batches_of_the_stream(num_examples, batch_size, seed, last):
    if last != "carry":
        batch_size = min(batch_size, num_examples)
    order = Order(num_examples, batch_size=batch_size, seed=seed, last=last)
    stream = Order(num_examples, batch_size=3 * num_examples, seed=seed, last="carry").indices(0)
    batches = batches_of(num_examples, batch_size, last, epochs=3)
    before = 0
    for step, positions in enumerate(batches):
        assert torch.equal(order.indices(step), stream[positions])
        assert order.epoch(step) == positions[0] // num_examples
        assert order.examples_before(step) == before
        before += len(positions)
    assert order.num_steps(3) == len(batches)
    assert order.num_steps(0) == 0


def test_counting_tells_the_policies_apart():
    # 10 examples in batches of 4: the brute-force oracle must not agree for the wrong reason.
    counts = {last: len(batches_of(10, 4, last, epochs=3)) for last in ("keep", "carry", "drop")}
    assert counts == {"keep": 9, "carry": 7, "drop": 6}
    assert batches_of(10, 4, "keep", 1)[-1] == [8, 9]
    assert batches_of(10, 4, "carry", 2)[2] == [8, 9, 10, 11]


@reproducible
@given(sizes, seeds, st.integers(0, 10**9), st.data())
def test_each_epoch_holds_every_example_once(num_examples, seed, epoch, data):
    batch_size = data.draw(st.integers(max(1, num_examples // 20), num_examples))
    everything = list(range(num_examples))
    for last in ("keep", "drop"):
        order = Order(num_examples, batch_size=batch_size, seed=seed, last=last)
        steps = order.num_steps(1)
        visited = torch.cat([order.indices(epoch * steps + step) for step in range(steps)])
        if last == "keep":
            assert sorted(visited.tolist()) == everything
        else:
            assert len(set(visited.tolist())) == steps * batch_size
    carry = Order(num_examples, batch_size=num_examples, seed=seed, last="carry")
    assert sorted(carry.indices(epoch).tolist()) == everything


@pytest.mark.parametrize("last", ["keep", "carry", "drop"])
def test_any_order_of_calls_gives_the_same_steps(last):
    order = Order(1797, batch_size=64, seed=3, last=last)
    sequential = [order.indices(step) for step in range(400)]
    copy = pickle.loads(pickle.dumps(order))
    assert copy == order
    assert hash(copy) == hash(order)
    for step in np.random.default_rng(0).permutation(400):
        permutation._get_block.cache_clear()
        assert torch.equal(copy.indices(step), sequential[step])


@pytest.mark.parametrize("batch_size", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("num_examples", [7, BLOCK - 1, BLOCK, 10**12])
def test_batches_cross_the_borders_of_blocks(num_examples, batch_size):
    order = Order(num_examples, batch_size=batch_size, seed=5, last="carry")
    step = 4 * BLOCK // batch_size
    batch = order.indices(step).tolist()
    assert len(batch) == batch_size
    for offset in {0, batch_size // 2, batch_size - 1, 4 * BLOCK % batch_size}:
        position = step * batch_size + offset
        assert batch[offset] == example_at(position, num_examples, seed=5)


def test_what_the_caller_does_to_a_batch_changes_no_later_one():
    order = Order(100, batch_size=10)
    first = order.indices(0)
    rest = first.clone()
    first.zero_()
    assert torch.equal(order.indices(0), rest)
    assert rest.any()


def test_batch_size_and_policy_do_not_change_the_permutation():
    small = Order(100, batch_size=10, seed=1)
    whole = Order(100, batch_size=100, seed=1, last="drop")
    for epoch in range(3):
        batches = [small.indices(10 * epoch + step) for step in range(10)]
        assert torch.equal(torch.cat(batches), whole.indices(epoch))


def test_without_shuffling_each_epoch_is_in_the_order_of_the_data():
    order = Order(10, batch_size=4, shuffle=False)
    batches = [order.indices(step).tolist() for step in range(4)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    carry = Order(10, batch_size=4, shuffle=False, last="carry")
    assert carry.indices(2).tolist() == [8, 9, 0, 1]


def test_indices_are_int64_on_the_cpu():
    batch = Order(np.int32(10), batch_size=np.int64(4), seed=np.uint64(7)).indices(np.int64(0))
    assert (batch.dtype, batch.shape, batch.device.type) == (torch.int64, (4,), "cpu")
    assert Order(np.int32(10), batch_size=np.int64(4)) == Order(10, batch_size=4)


def test_order_is_what_a_training_loop_asks_for():
    class Half:
        indices = num_steps = epoch = len

    assert isinstance(Order(10, batch_size=4), OrderProtocol)
    assert not isinstance(Half(), OrderProtocol)  # examples_before is missing


# ---------------------------------------------------------------- no silent change

GOLDEN = {  # (N, seed, step) at B = 5, from a C program written from the docstring's equations
    (5, 0, 0): [3, 4, 1, 0, 2],
    (5, 1, 1000): [3, 0, 1, 2, 4],
    (10, MASK, 123456789): [3, 9, 7, 8, 1],
    (256, 0, 0): [131, 58, 86, 144, 218],
    (1797, 0, 0): [1620, 1472, 1023, 1263, 625],
    (1797, 1, 1000): [1498, 1016, 586, 649, 1641],
    (60000, 0, 123456789): [22997, 29188, 12092, 6539, 8679],
    (10**9, 1, 1000): [837751960, 3466917, 408176257, 414711401, 754460337],
    (10**12, 0, 0): [364267319123, 404836574720, 909812947344, 400717274870, 162889927076],
    (10**12, 1, 123456789): [
        *(835131524711, 156109566730, 657735581587, 178442859562, 563152340266),
    ],
}


@pytest.mark.parametrize(("num_examples", "seed", "step"), GOLDEN)
def test_the_order_never_changes_between_versions(num_examples, seed, step):
    order = Order(num_examples, batch_size=5, seed=seed, last="carry")
    assert order.indices(step).tolist() == GOLDEN[num_examples, seed, step]


# ---------------------------------------------------------------- 10^12 examples


def test_a_permutation_of_a_trillion_can_be_undone():
    order = Order(10**12, batch_size=256, seed=9)
    steps = order.num_steps(1)
    for step in (0, steps // 3, steps - 1, 10**6 * steps + 17):
        key = key_of(9, order.epoch(step))
        first = order.examples_before(step) % 10**12
        batch = order.indices(step).tolist()
        places = [place_of(example, 10**12, key) for example in batch]
        assert places == list(range(first, first + len(batch)))
        assert place_of(batch[0] ^ 1, 10**12, key) != first  # a wrong example is noticed


def test_a_trillion_examples_take_constant_memory():
    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        bytes_at_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_at_most

    def far_steps() -> None:
        order = Order(10**12, batch_size=256)
        for step in range(0, 3 * 10**9, 10**8):
            order.indices(step)

    # 4 blocks of 128 KiB are kept, and the making of one takes about 8 more.
    assert peak(far_steps) < 2 * 2**20
    assert peak(lambda: np.random.default_rng(0).permutation(10**6)) > 2 * 2**20


def test_large_batches_of_a_trillion_are_distinct_and_in_range():
    batch = Order(10**12, batch_size=200_000, seed=1).indices(4_000_000)
    assert batch.unique().numel() == 200_000
    assert 0 <= int(batch.min()) < 10**8  # of 200,000 uniform draws the least is near 5e6,
    assert 10**12 - 10**8 < int(batch.max()) < 10**12  # and exceeds 1e8 with probability e^-20


def test_a_step_costs_microseconds():
    order = Order(60_000, batch_size=64)

    def seconds() -> float:
        start = time.perf_counter()
        for step in range(1000):
            order.indices(step)
        return (time.perf_counter() - start) / 1000

    permutation._get_block.cache_clear()
    assert min(seconds() for _ in range(3)) < 50e-6  # about 4e-6 where nothing else runs


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0. It must be at least 1.*data set is empty"),
        ({"num_examples": -3}, "num_examples is -3"),
        ({"num_examples": 10.0}, r"10.0 of type float. It must be an integer.*len\(data\)"),
        ({"num_examples": True}, "num_examples is True of type bool"),
        ({"num_examples": 10**12 + 1}, r"at most 10\^12: the permutation is tested up to there"),
        ({"batch_size": 0}, "batch_size is 0. It must be at least 1"),
        ({"batch_size": 2.5}, "2.5 of type float. It must be an integer.*//"),
        ({"batch_size": 11}, "11. It must be at most num_examples, 10.*last='carry'.*at most 10"),
        ({"batch_size": 11, "last": "drop"}, "an epoch does not fill one batch"),
        ({"seed": -1}, "seed is -1. It must be at least 0"),
        ({"seed": 2**64 + 7}, r"must be less than 2\^64.*Pass 7"),
        ({"seed": None}, "seed is None of type NoneType"),
        ({"last": "pad"}, "'pad'. It must be 'keep'.*'carry'.*'drop'"),
        ({"last": None}, "last is None"),
        ({"shuffle": 42}, "shuffle is 42. It must be True.*False.*seed="),
    ],
)
def test_mistaken_arguments_are_refused_with_the_fix(arguments, message):
    with pytest.raises(OrderError, match=message):
        Order(**{"num_examples": 10, "batch_size": 4} | arguments)


@pytest.mark.parametrize("member", ["indices", "epoch", "examples_before", "num_steps"])
def test_mistaken_steps_and_epochs_are_refused(member):
    call = getattr(Order(10, batch_size=4), member)
    for value, message in [(-1, "at least 0"), (1.0, "type float"), (False, "type bool")]:
        with pytest.raises(AnybatchError, match=rf"^(step|epochs) is {value}.*{message}"):
            call(value)


def test_an_order_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign"):
        Order(10, batch_size=4).seed = 1


def test_a_batch_larger_than_the_data_is_allowed_where_batches_go_on():
    order = Order(10, batch_size=25, last="carry")
    batch = order.indices(0).tolist()
    assert sorted(batch[:10]) == sorted(batch[10:20]) == list(range(10))
    assert (order.num_steps(4), order.num_steps(5), order.epoch(1)) == (1, 2, 2)
