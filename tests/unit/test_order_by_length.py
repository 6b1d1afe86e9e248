"""ByLength against an item-by-item oracle, and what it says of padding and of chance.

Batches are compared exactly. What is random is counted over epochs: a count may be 4.5 standard
deviations from its mean, which one of the 52 passes with probability 4e-4 at other seeds.
"""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
from anybatch.errors import OrderError
from anybatch.order import Order
from anybatch.order.by_length import ByLength, padding_share
from orders_by_hand import by_length
from properties import seeded_examples

SKEWED = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int) + 1  # median 55, longest ~2000

reproducible = seeded_examples(40)


def walk(order, epochs):
    return [order.indices(step).tolist() for step in range(order.num_steps(epochs))]


@reproducible
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=120),
    seed=st.integers(0, 2**64 - 1),
    last=st.sampled_from(["keep", "drop"]),
    window=st.integers(1, 12),
    data=st.data(),
)
def test_batches_are_those_of_the_oracle(lengths, seed, last, window, data):
    batch_size = data.draw(st.integers(1, len(lengths)))
    order = ByLength(lengths, batch_size=batch_size, seed=seed, last=last, window=window)
    assert walk(order, 2) == by_length(lengths, batch_size, seed, last, window, epochs=2)


def test_the_oracle_tells_lengths_windows_visits_and_ragged_ends_apart():
    lengths = SKEWED[:50].tolist()
    right = by_length(lengths, 4, 0, "keep", 3, 2)
    assert right != by_length(lengths[::-1], 4, 0, "keep", 3, 2)
    assert right != by_length(lengths, 4, 0, "keep", 2, 2)
    assert right != by_length(lengths, 4, 0, "drop", 3, 2)
    windows = [sorted(right[k : k + 3], key=lambda b: lengths[b[0]]) for k in (0, 3, 6, 9)]
    assert right[:12] != [batch for window in windows for batch in window]


@reproducible
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    st.integers(0, 10**12),
    st.integers(1, 60),
    st.data(),
)
def test_each_epoch_holds_every_example_once(lengths, epoch, window, data):
    size = len(lengths)
    batch_size = data.draw(st.integers(max(1, size // 20), size))
    for last in ("keep", "drop"):
        order = ByLength(lengths, batch_size=batch_size, last=last, window=window)
        steps = order.num_steps(1)
        visited = torch.cat([order.indices(epoch * steps + step) for step in range(steps)]).tolist()
        if last == "keep":
            assert sorted(visited) == list(range(size))
        else:
            assert len(set(visited)) == len(visited) == size // batch_size * batch_size


def test_a_window_holds_the_examples_of_the_same_steps_of_order():
    order = ByLength(SKEWED, batch_size=32, seed=4, window=10)
    plain = Order(len(SKEWED), batch_size=32, seed=4)
    epoch = order.num_steps(1)
    for first, last in [(0, 10), (80, 90), (90, 93), (epoch, epoch + 10)]:  # 93 are whole
        ours = torch.cat([order.indices(step) for step in range(first, last)])
        theirs = torch.cat([plain.indices(step) for step in range(first, last)])
        assert ours.sort().values.equal(theirs.sort().values)
        assert not ours.equal(theirs)
    assert order.indices(93).equal(plain.indices(93))  # the ragged end, unsorted
    assert len(order.indices(93)) == 3000 - 93 * 32


def test_examples_of_a_batch_ascend_in_length():
    batches = walk(ByLength(SKEWED, batch_size=32, last="drop"), 1)
    assert all((np.diff(SKEWED[batch]) >= 0).all() for batch in batches)


# ---------------------------------------------------------------- padding


def share_by_hand(batches, lengths):
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("window", [1, 10, 50])
def test_the_share_of_padding_is_that_of_the_sums(window):
    order = ByLength(SKEWED, batch_size=32, seed=1, window=window)
    result, expected = (
        padding_share(order, SKEWED, epochs=2),
        share_by_hand(walk(order, 2), SKEWED),
    )
    assert math.isclose(result, expected, rel_tol=1e-12)  # sums of 6,000 whole numbers


def test_padding_is_far_below_that_of_a_plain_shuffle_and_falls_with_the_window():
    plain = padding_share(Order(len(SKEWED), batch_size=32, seed=1), SKEWED)
    shares = [
        padding_share(ByLength(SKEWED, batch_size=32, seed=1, window=window), SKEWED)
        for window in (1, 5, 50)
    ]
    assert plain > 0.7
    assert shares[0] == plain  # the control: batches of a window of 1 are those of Order
    assert shares[2] < shares[1] < 0.8 * plain
    assert shares[2] < 0.4 * plain


def test_padding_of_nothing_is_none():
    assert padding_share(ByLength([0, 0, 0], batch_size=2), [0, 0, 0]) == 0
    assert padding_share(ByLength([1, 2], batch_size=2), [1, 2], epochs=0) == 0


# ---------------------------------------------------------------- chance

SIZE, BATCH, EPOCHS = 13, 3, 3000


def largest_deviation(epochs):
    """Test whether each example is equally likely to be visited in each step."""
    counts = np.zeros((SIZE // BATCH, SIZE))
    for batches in epochs:
        for step, batch in enumerate(batches):
            counts[step, batch] += 1
    chance = BATCH / SIZE
    return np.abs(counts - EPOCHS * chance).max() / math.sqrt(EPOCHS * chance * (1 - chance))


def ours():
    """Epochs of 4 whole batches, in 2 windows; one example of the 13 is left out of each."""
    order = ByLength(range(SIZE), batch_size=BATCH, last="drop", window=2)
    batches = walk(order, EPOCHS)
    return [batches[k : k + 4] for k in range(0, len(batches), 4)]


def longest_left_out():
    """Make the mistake to cut the last, short batch from the sorted window."""
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        permutation = rng.permutation(SIZE)
        windows = [np.sort(permutation[:6]), np.sort(permutation[6:])[:6]]
        yield [batch for w in windows for batch in rng.permutation(w.reshape(2, BATCH))]


def test_each_example_is_equally_likely_in_each_step():
    assert largest_deviation(ours()) < 4.5


def test_visits_by_length_and_a_ragged_end_of_the_longest_are_seen():  # the controls
    shortest_first = ([*sorted(batches[:2]), *sorted(batches[2:])] for batches in ours())
    assert largest_deviation(shortest_first) > 20
    assert largest_deviation(longest_left_out()) > 20


def weight_of_short_tokens(order, reduction):
    """Mean coefficient of the shortest tenth over an epoch, in those of the longest tenth."""

    def example_losses(model, batch):
        return ab.ExampleLosses(model(batch[:, None])[:, 0], counts=batch)

    model, coefficients = torch.nn.Linear(1, 1), np.zeros(len(SKEWED))
    objective = ab.Objective(example_losses, reduction=reduction)
    for batch in ab.batches(torch.tensor(SKEWED, dtype=torch.float32), order, stop=93):
        gradient = ab.batch_gradient(model, objective, batch.examples, key=batch.key)
        coefficients[batch.ids] += gradient.coefficients.numpy()
    shares = coefficients[np.argsort(SKEWED, kind="stable")]
    return shares[:300].mean() / shares[-300:].mean()


def test_a_token_mean_favours_short_examples_and_a_fixed_count_does_not():
    ours = ByLength(SKEWED, batch_size=32, last="drop")
    plain = Order(3000, batch_size=32, last="drop")
    assert weight_of_short_tokens(ours, ab.Mean()) > 20
    assert weight_of_short_tokens(plain, ab.Mean()) < 1.5  # the control
    fixed = 1 / (32 * SKEWED.mean()) * ab.Sum()
    assert abs(weight_of_short_tokens(ours, fixed) - 1) < 0.05  # 24 of 3,000 are dropped


def test_epochs_and_seeds_have_windows_and_visits_of_their_own():
    order = ByLength(SKEWED, batch_size=30, seed=0, window=100)  # one window an epoch
    first = [sorted(batch) for batch in walk(order, 1)]
    second = [sorted(batch) for batch in walk(order, 2)[100:]]
    other = [sorted(batch) for batch in walk(ByLength(SKEWED, batch_size=30, seed=1), 1)]
    assert first != second
    assert first != other
    longest = int(SKEWED.argmax())
    steps = [next(t for t, b in enumerate(e) if longest in b) for e in (first, second, other)]
    assert len(set(steps)) == 3


# ---------------------------------------------------------------- a value


def test_it_prints_no_lengths_but_a_digest_that_tells_them_apart():
    order = ByLength(SKEWED, batch_size=32)
    changed = SKEWED.copy()
    changed[7] += 1
    other = ByLength(changed, batch_size=32)
    assert len(repr(order)) < 200
    assert repr(order) == repr(ByLength(SKEWED.tolist(), batch_size=32))
    assert repr(order) != repr(other)
    assert order == pickle.loads(pickle.dumps(order)) != other
    assert hash(order) == hash(pickle.loads(pickle.dumps(order)))


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([3, 1, 2], np.uint8),
        np.array([3.0, 1.0, 2.0]),
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([3, 1, 2]),
        (3, 1, 2),
    ],
)
def test_lengths_come_in_any_kind_and_are_copied(lengths):
    order = ByLength(lengths, batch_size=2, window=1)
    assert order == ByLength([3, 1, 2], batch_size=2, window=1)
    with pytest.raises(ValueError, match="read-only"):
        order.lengths[0] = 5
    if isinstance(lengths, np.ndarray):
        lengths[:] = 9
        assert order.lengths.tolist() == [3, 1, 2]


def test_what_the_caller_does_to_a_batch_changes_no_later_one():
    order = ByLength(SKEWED, batch_size=32)
    first = order.indices(0)
    rest = first.clone()
    first.zero_()
    assert order.indices(0).equal(rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, r"lengths have shape \(0,\).*with N at least 1"),
        ({"lengths": [[1, 2], [3, 4]]}, r"lengths have shape \(2, 2\).*one number per example"),
        ({"lengths": [[1, 2], [3]]}, "lengths are ragged.*len\\(example\\)"),
        ({"lengths": ["a", "bb", "c"]}, "dtype <U2. Pass one number"),
        ({"lengths": [1, None, 2]}, "dtype object. Pass one number"),
        ({"lengths": torch.ones(3, dtype=torch.complex64)}, "dtype complex64"),
        ({"lengths": [1, 2, -1, -2]}, r"lengths\[2\] is -1.0.*at least 0; 2 of 4"),
        ({"lengths": [1, math.nan, 2]}, r"lengths\[1\] is nan.*finite"),
        ({"lengths": [1, 2, math.inf]}, r"lengths\[2\] is inf"),
        ({"batch_size": 0}, "batch_size is 0. It must be at least 1"),
        ({"batch_size": 2.0}, "2.0 of type float. It must be an integer"),
        ({"batch_size": 5}, "batch_size is 5. It must be at most num_examples, 4.*Use a batch of"),
        ({"window": 0}, "window is 0. It must be at least 1.*sorted together"),
        ({"window": None}, "window is None of type NoneType"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, r"must be less than 2\^64"),
        ({"last": "carry"}, "last is 'carry'. It must be 'keep'.*Windows end with the epoch"),
    ],
)
def test_mistaken_arguments_are_refused_with_the_fix(arguments, message):
    with pytest.raises(OrderError, match=message):
        ByLength(**{"lengths": [1, 2, 3, 4], "batch_size": 2} | arguments)
