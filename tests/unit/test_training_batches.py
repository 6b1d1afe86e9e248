"""Batches of every kind of data: random access, and keys of augmentation.

The oracle is plain indexing by `order.indices`, which has its own tests.
"""

from collections import Counter
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import anybatch as ab
from anybatch.errors import BatchError, DataError
from anybatch.pytree import Uncollated, prepare_batch
from properties import seeded_examples

N = 10
X = torch.arange(N * 3.0).reshape(N, 3)
Y = torch.arange(N)
ORDER = ab.Order(N, batch_size=4, seed=5)


class Examples(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


class MapStyle(Dataset):
    """A map-style data set."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Fetched(MapStyle):
    """One that reads a batch at once."""

    def __init__(self):
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(indices)
        return [self[index] for index in indices]


class Rows:
    """Like a Hugging Face `Dataset`: columns, read as dict rows."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        raise AssertionError("a batch is read at once")

    def __getitems__(self, indices):
        return [{"inputs": X[i].tolist(), "targets": int(Y[i])} for i in indices]


class ByRow:
    """A column that is read when it is needed: of X, or of another tensor."""

    def __init__(self, column=X):
        self.column, self.calls = column, []

    def __len__(self):
        return len(self.column)

    def rows(self, ids):
        self.calls.append(ids.tolist())
        return self.column[ids]


class WithRows(MapStyle):
    """A data set that has something called rows, too."""

    def rows(self, ids):
        raise AssertionError("a data set is read by its index")


class Doubled(TensorDataset):
    """A TensorDataset that does more on reading."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x, y


def as_pair(examples):
    if isinstance(examples, dict):
        inputs = examples["inputs"]
        if isinstance(inputs, list):  # columns of numbers, as default_collate leaves them
            inputs = torch.stack(inputs, 1).float()
        return inputs, examples["targets"]
    return tuple(examples)


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        {"inputs": X, "targets": Y},
        Examples(X, Y),
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        MapStyle(),
        Fetched(),
        Rows(),
        WithRows(),
        (ByRow(), Y),
        (ByRow(), ByRow(Y)),
        {"inputs": ByRow(), "targets": Y},
        Subset(MapStyle(), range(N)),
        Subset(Fetched(), range(N)),
        [(X[i], int(Y[i])) for i in range(N)],
    ],
    ids=lambda data: type(data).__name__,
)
def test_each_kind_of_data_gives_the_examples_of_the_order(data):
    for batch in ab.batches(data, ORDER, stop=6):
        ids = ORDER.indices(batch.step)
        inputs, targets = as_pair(batch.examples)
        assert torch.equal(batch.ids, ids)
        assert torch.equal(inputs, X[ids])
        assert torch.equal(targets, Y[ids])
        assert (batch.key, batch.epoch) == (ab.Key(5, batch.step), batch.step // 3)


@pytest.mark.parametrize("data", [X, X.numpy(), ByRow(), [X[i] for i in range(N)]])
def test_a_tensor_an_array_a_column_and_a_list_of_examples_give_a_tensor(data):
    for batch in ab.batches(data, ORDER, stop=3):
        assert torch.equal(batch.examples, X[ORDER.indices(batch.step)])


def test_a_named_tuple_stays_one():
    assert type(next(ab.batches(Examples(X, Y), ORDER)).examples) is Examples


def test_a_subclass_of_a_tensor_dataset_is_read_by_its_own_index():
    batch = next(ab.batches(Doubled(X, Y), ORDER))
    assert torch.equal(batch.examples[0], 2 * X[batch.ids])


def test_a_data_set_that_can_is_asked_once_a_batch():
    data = Fetched()
    list(ab.batches(data, ORDER, stop=4))
    assert data.calls == [ORDER.indices(step).tolist() for step in range(4)]


@pytest.mark.parametrize("how", [{}, {"collate": list}, {"transform": lambda x, key: x}])
def test_a_column_is_read_once_a_batch(how):
    column = ByRow()
    for batch in ab.batches((column, Y), ORDER, stop=4, **how):
        examples = batch.examples
        if isinstance(examples, Uncollated):
            examples = [torch.stack(rows) for rows in zip(*examples.examples, strict=True)]
        assert torch.equal(examples[0], X[batch.ids])
        assert torch.equal(examples[1], Y[batch.ids])
    assert column.calls == [ORDER.indices(step).tolist() for step in range(4)]


def test_a_model_is_evaluated_on_a_column():
    model = torch.nn.Linear(3, 1)
    objective = ab.Objective(lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2)
    by_hand = ((X @ model.weight.T + model.bias)[:, 0] - Y).pow(2).mean().item()
    result = ab.evaluate(model, objective, (ByRow(), Y), micro_batch=3)
    assert result.num_examples == N
    assert result.loss == pytest.approx(by_hand, rel=1e-5)  # float32, other shapes of products


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(BatchError, match=r"data\[0\] has 10, data\[1\] has 4"):
        next(ab.batches((ByRow(), Y[:4]), ORDER))


@seeded_examples(30)
@given(start=st.integers(0, 10**12), last=st.sampled_from(["keep", "carry", "drop"]))
def test_any_batch_is_as_near_as_the_first(start, last):
    order = ab.Order(N, batch_size=4, seed=5, last=last)
    batch = next(ab.batches((X, Y), order, start))
    assert batch.step == start
    assert torch.equal(batch.ids, order.indices(start))
    assert torch.equal(batch.examples[0], X[order.indices(start)])
    assert batch.key == ab.Key(5, start)


def test_batches_end_before_stop_and_go_on_without_it():
    assert [batch.step for batch in ab.batches(X, ORDER, 2, stop=5)] == [2, 3, 4]
    assert list(ab.batches(X, ORDER, 5, stop=5)) == []
    sizes = [len(batch.ids) for batch in islice(ab.batches(X, ORDER), 7)]
    assert sizes == [4, 4, 2, 4, 4, 2, 4]


class Stream(IterableDataset):
    def __len__(self):
        return N

    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([X]), r"of type list_iterator, without a length .* pass list\(data\)"),
        (Stream(), "of type Stream, .* cannot be put in a keyed order"),
        (
            DataLoader(TensorDataset(X)),
            "a DataLoader.* data=loader.dataset .* collate=loader.collate_fn",
        ),
        (TensorDataset(X[:4]), r"the order is over 10 examples, but the data hold 4. .*Order\(4"),
        ((X[:2], Y[:2]), r"data hold 2.* len\(\) of a tuple of tensors is the number of tensors"),
        ((X, ["a"] * N), r"data\[1\]\[0\] is of type str. Data in a tuple"),
        ({"train": MapStyle()}, "is of type MapStyle. .* or a single data set"),
        ((), "the order is over 10 examples, but the data hold 0"),
    ],
)
def test_data_that_cannot_be_put_in_order_say_why(data, message):
    with pytest.raises(ValueError, match=message):
        next(ab.batches(data, ORDER))


def test_an_order_over_the_length_of_a_tuple_is_explained():
    with pytest.raises(DataError, match=r"over 2 examples, but the data hold 10.* len\(\) of a"):
        next(ab.batches((X, Y), ab.Order(len((X, Y)), batch_size=1)))


def keys_seen(batch_size, epochs, last="keep", seed=5):
    """Count the keys that each visit of each example gets, by (epoch, id)."""
    counter = Counter()

    def transform(example, key):
        assert torch.equal(example, X[key.id])
        counter[key] += 1
        return example

    order = ab.Order(N, batch_size=batch_size, seed=seed, last=last)
    for batch in ab.batches(X, order, stop=order.num_steps(epochs), transform=transform):
        assert torch.equal(batch.examples, X[batch.ids])
    return counter


def keys_of_the_first(visits):
    """Compute the oracle: visit p belongs to epoch p // N, by the order of single examples."""
    single = ab.Order(N, batch_size=1, seed=5)
    return Counter(ab.ExampleKey(5, p // N, single.indices(p).item()) for p in range(visits))


@pytest.mark.parametrize(
    ("batch_size", "last", "epochs", "visits"),
    [
        (1, "keep", 1, 10),
        (3, "keep", 4, 40),
        (10, "keep", 2, 20),
        (4, "carry", 1, 8),
        (4, "carry", 2, 20),
        (7, "carry", 5, 49),
        (25, "carry", 5, 50),  # each batch goes through three epochs
    ],
)
def test_each_visit_of_an_example_has_one_key_whatever_the_batch(batch_size, last, epochs, visits):
    assert keys_seen(batch_size, epochs, last) == keys_of_the_first(visits)


def test_the_epoch_of_the_batch_would_give_an_example_the_same_key_twice():
    """Control: why a batch that is carried over needs more than its own epoch."""
    order = ab.Order(N, batch_size=4, seed=5, last="carry")
    wrong = Counter(
        ab.ExampleKey(5, batch.epoch, i)
        for batch in ab.batches(X, order, stop=10)
        for i in batch.ids.tolist()
    )
    assert wrong != keys_of_the_first(40)
    assert max(wrong.values()) == 2


class Twice:
    """An order of its own that shows each example twice in a batch."""

    seed, num_examples = 5, N

    def indices(self, step):
        return torch.tensor([step % N] * 2)

    def num_steps(self, epochs):
        return epochs * N // 2

    def epoch(self, step):
        return 2 * step // N

    def examples_before(self, step):
        return 2 * step


class TwiceAndSaysSo(Twice):
    """One that tells the visits apart."""

    def visits(self, step):
        return [2 * step, 2 * step + 1]


@pytest.mark.parametrize(("order", "epochs"), [(Twice(), [0, 0]), (TwiceAndSaysSo(), [6, 7])])
def test_an_order_says_what_tells_the_visits_of_an_example_apart(order, epochs):
    batch = next(ab.batches(X, order, 3, transform=lambda _, key: key, collate=list))
    assert batch.examples.examples == [ab.ExampleKey(5, epoch, 3) for epoch in epochs]


def test_an_example_may_be_changed_in_place():
    def zero(example, _):
        return example.zero_()

    before = X.clone()
    batch = next(ab.batches(X, ORDER, transform=zero))
    assert not batch.examples.any()
    assert torch.equal(X, before)


def test_examples_epochs_and_seeds_draw_different_numbers():
    draws = {
        key: (key.numpy().random(), torch.rand((), generator=key.generator()).item())
        for key in (ab.ExampleKey(s, e, i) for s in (0, 1) for e in (0, 1) for i in range(20))
    }
    assert len({value for pair in draws.values() for value in pair}) == 2 * len(draws)
    again = ab.ExampleKey(1, 0, 3)
    assert draws[again] == (
        again.numpy().random(),
        torch.rand((), generator=again.generator()).item(),
    )


def test_transform_gets_single_examples_and_collate_what_it_makes():
    def transform(example, key):
        x, y = example
        return x[: 1 + key.id % 3], y

    def collate(examples):
        rows = [x for x, _ in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), [y for _, y in examples]

    batch = next(ab.batches((X, Y), ORDER, transform=transform, collate=collate))
    assert isinstance(batch.examples, Uncollated)
    padded, targets = prepare_batch(batch.examples)
    ids = batch.ids.tolist()
    assert [int(y) for y in targets] == ids
    assert padded.shape == (4, max(1 + i % 3 for i in ids))
