"""Orders by length, weighted and growing in `steps`: any step, and a resume.

The oracles are a walk that counts what it sees, a loop of plain autograd over the batches of
`orders_by_hand`, and the training itself without a run, whose bits a resumed one must have.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anybatch as ab
import orders_by_hand
from anybatch.errors import DataError, OrderError, RunError
from anybatch.order import Order, OrderProtocol
from anybatch.order.by_length import ByLength
from anybatch.order.growing import Growing
from anybatch.order.weighted import Weighted
from properties import seeded_examples

N, SEED = 22, 6
NUMBERS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]
SIZES = ((0, 3), (11, 5), (30, 8))

ORDERS = {
    "by length": ByLength(NUMBERS, batch_size=4, seed=SEED, window=2),
    "by length, drop": ByLength(NUMBERS, batch_size=4, seed=SEED, window=2, last="drop"),
    "weighted": Weighted(NUMBERS, batch_size=4, seed=SEED),
    "growing": Growing(N, sizes=SIZES, seed=SEED),
}
OTHERS = {  # one number of the data differs
    "by length": ByLength([2, *NUMBERS[1:]], batch_size=4, seed=SEED, window=2),
    "by length, drop": ByLength([2, *NUMBERS[1:]], batch_size=4, seed=SEED, window=2, last="drop"),
    "weighted": Weighted([3.0001, *NUMBERS[1:]], batch_size=4, seed=SEED),
    "growing": Growing(N, sizes=((0, 3), (11, 5), (31, 8)), seed=SEED),
}
BY_HAND = {
    "by length": orders_by_hand.by_length(NUMBERS, 4, SEED, "keep", 2, epochs=3),
    "by length, drop": orders_by_hand.by_length(NUMBERS, 4, SEED, "drop", 2, epochs=3),
    "weighted": orders_by_hand.weighted(NUMBERS, 4, SEED, epochs=3),
    "growing": orders_by_hand.growing(N, SIZES, SEED, epochs=3),
}
each_order = pytest.mark.parametrize("name", ORDERS)


# ---------------------------------------------------------------- any step


@each_order
@seeded_examples(30)
@given(st.lists(st.integers(0, 300) | st.integers(0, 10**15), min_size=1, max_size=12))
def test_a_step_is_the_same_whatever_was_asked_before(name, steps):
    order = ORDERS[name]
    alone = {step: order.indices(step).clone() for step in sorted(steps)}
    for step in steps:
        batch = order.indices(step)
        assert batch.equal(alone[step])
        assert (batch.dtype, batch.device.type) == (torch.int64, "cpu")
        assert len(batch) == len(order.visits(step)) > 0
        assert 0 <= int(batch.min()) <= int(batch.max()) < N
        assert order.examples_before(step + 1) - order.examples_before(step) == len(batch)


@each_order
def test_counts_are_those_of_a_walk(name):
    order, walk = ORDERS[name], BY_HAND[name]
    before = 0
    dropped = N % 4 if name == "by length, drop" else 0
    for step, batch in enumerate(walk):
        assert order.examples_before(step) == before
        epoch = step // 5 if dropped else before // N
        assert order.epoch(step) == epoch == (before + epoch * dropped) // N
        before += len(batch)
    assert order.num_steps(3) == len(walk)
    assert order.num_steps(0) == 0


@each_order
def test_each_order_is_what_a_training_loop_asks_for(name):
    order = ORDERS[name]
    assert isinstance(order, OrderProtocol)
    assert (order.seed, order.num_examples) == (SEED, N)
    with pytest.raises(AttributeError, match="cannot assign"):
        order.seed = 1
    for member in ("indices", "epoch", "examples_before", "num_steps", "visits"):
        for value, message in [(-1, "at least 0"), (1.0, "type float"), (True, "type bool")]:
            with pytest.raises(OrderError, match=rf"^(step|epochs) is {value}.*{message}"):
                getattr(order, member)(value)
    assert order.indices(np.int64(1)).equal(order.indices(1))


@pytest.mark.parametrize("last", ["keep", "carry", "drop"])
def test_visits_of_order_are_the_epochs_of_a_walk(last):
    order = Order(10, batch_size=4, seed=1, last=last)
    used_batches = [
        (epoch, example)
        for step in range(order.num_steps(4))
        for epoch, example in zip(order.visits(step), order.indices(step).tolist(), strict=True)
    ]
    stream = Order(10, batch_size=10, seed=1)
    num_used = 8 if last == "drop" else 10
    expected = [(e, i) for e in range(4) for i in stream.indices(e)[:num_used].tolist()]
    assert used_batches == expected
    assert order.visits(2) == {"keep": [0, 0], "carry": [0, 0, 1, 1], "drop": [1, 1, 1, 1]}[last]


# ---------------------------------------------------------------- training

X = torch.from_numpy(np.random.default_rng(0).standard_normal((N, 3)))
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 1


def example_losses(model, batch):
    x, y = batch
    return (model(x)[:, 0] - y) ** 2


def start():
    torch.manual_seed(2)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(order, run=None, stop=None, transform=None):
    """Losses, and the weights at the end; left after `stop` updates."""
    model, optimizer = start()
    objective, losses = ab.Objective(example_losses), []
    for step in ab.steps(
        model, objective, optimizer, (X, Y), order=order, epochs=3, run=run, transform=transform
    ):
        losses.append(step.loss)
        if step.step + 1 == stop:
            step.save()
            break
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def by_autograd(batches):
    model, optimizer = start()
    for batch in batches:
        optimizer.zero_grad()
        example_losses(model, (X[batch], Y[batch])).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@each_order
def test_training_is_that_of_plain_autograd_over_batches_by_hand(name):
    losses, weights = train(ORDERS[name])
    assert len(losses) == len(BY_HAND[name])
    expected = by_autograd(BY_HAND[name])
    # 12 to 18 updates in float64, each rounded at 1e-16 in another order of summation.
    assert torch.linalg.norm(weights - expected) < 1e-13 * torch.linalg.norm(expected)
    swapped = [*BY_HAND[name][1::-1], *BY_HAND[name][2:]]  # the control: two batches change places
    assert torch.linalg.norm(weights - by_autograd(swapped)) > 1e-6


@pytest.mark.fast(1)
@each_order
def test_a_run_left_at_any_step_ends_as_if_never_left(tmp_path, name):
    losses, weights = train(ORDERS[name])
    for stop in (1, 4, 5, 6, len(losses) - 1):
        train(ORDERS[name], tmp_path / str(stop), stop)
        rest, end = train(ORDERS[name], tmp_path / str(stop))
        assert rest == losses[stop:]
        assert end.equal(weights)


def test_an_order_that_counts_its_calls_is_seen(tmp_path):  # the control
    class Counting:
        seed, num_examples = SEED, N

        def __init__(self):
            self.of, self.calls = ORDERS["by length"], 0

        def __getattr__(self, name):
            return getattr(self.of, name)

        def indices(self, step):
            self.calls += 1
            return self.of.indices(self.calls - 1)

        def __repr__(self):
            return "Counting()"

    _, weights = train(Counting())
    train(Counting(), tmp_path, 4)
    _, end = train(Counting(), tmp_path)
    assert not end.equal(weights)


@each_order
def test_a_resume_with_other_numbers_is_refused(tmp_path, name):
    train(ORDERS[name], tmp_path, 2)
    with pytest.raises(RunError, match=r"was begun with order = .*\(.*Restore the setting"):
        train(OTHERS[name], tmp_path)
    train(ORDERS[name], tmp_path)  # control: as it was


@each_order
def test_no_two_visits_share_the_random_numbers_of_their_augmentation(name):
    keys = []

    def noting(example, key):
        keys.append(key)
        return example

    losses, _ = train(ORDERS[name], transform=noting)
    assert len(keys) == len(set(keys)) == sum(map(len, BY_HAND[name]))
    assert [key.id for key in keys] == [i for batch in BY_HAND[name] for i in batch]
    assert losses == train(ORDERS[name])[0]


@each_order
def test_data_of_another_size_are_refused(name):
    with pytest.raises(DataError, match="the order is over 22 examples, but the data hold 21"):
        next(ab.batches((X[:21], Y[:21]), ORDERS[name]))
