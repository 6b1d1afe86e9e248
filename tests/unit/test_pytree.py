"""Batches of every class that people pass: cut like tensors, or refused by the leaf's name.

Oracle: the gradient by plain autograd of the same tensors in a tuple, and plain indexing.
"""

from collections import OrderedDict, UserDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import anybatch as ab
from anybatch import pytree
from anybatch.errors import BatchError
from anybatch.pytree import count_examples, prepare_batch, take_examples

transformers = pytest.importorskip("transformers")


@dataclass
class Record:
    x: Tensor
    y: Tensor

    @cached_property
    def total(self):
        return float(self.x.sum())


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor
    table: Any = field(default=None, kw_only=True)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Settings(Mapping):
    """A mapping of somebody's own."""

    def __init__(self, data):
        self._data = dict(data)

    def __getitem__(self, name):
        return self._data[name]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


def tensors(count=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator), torch.arange(count) % 3


def fields(x, y):
    return {"x": x, "y": y}


KINDS = {
    "dict": lambda x, y: fields(x, y),
    "ordered dict": lambda x, y: OrderedDict(fields(x, y)),
    "user dict": lambda x, y: UserDict(fields(x, y)),
    "batch encoding": lambda x, y: transformers.BatchEncoding(fields(x, y)),
    "batch feature": lambda x, y: transformers.BatchFeature(fields(x, y)),
    "mapping": lambda x, y: Settings(fields(x, y)),
    "proxy": lambda x, y: MappingProxyType(fields(x, y)),
    "dataclass": Record,
    "frozen dataclass": Frozen,
    "frozen dataclass with a shared leaf": lambda x, y: Frozen(x, y, table=ab.Shared(x[:2])),
    "named tuple": Pair,
    "list": lambda x, y: [x, y],
    "deque": lambda x, y: deque([x, y]),
    "nested": lambda x, y: ({"inner": transformers.BatchEncoding({"x": x})}, Record(x, y)),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
}


def both(batch):
    """Return the two tensors of a batch of any kind."""
    if isinstance(batch, tuple) and isinstance(batch[0], dict):
        return batch[0]["inner"]["x"], batch[1].y
    if isinstance(batch, Mapping | UserDict):
        return batch["x"], batch["y"]
    if isinstance(batch, tuple | list | deque):
        return tuple(torch.as_tensor(part) for part in batch)
    return batch.x, batch.y


def losses(model, batch):
    x, y = both(batch)
    return F.cross_entropy(model(x), y, reduction="none")


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [None, 3, 1])
def test_a_batch_of_any_class_gives_the_gradient_of_its_tensors(kind, micro_batch):
    model, (x, y) = linear(), tensors()
    batch = KINDS[kind](x, y)
    ab.batch_gradient(model, ab.Objective(losses), batch, layout=ab.Layout(micro_batch=micro_batch))
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model.weight)[0]
    # float32, some roundings of sums of 7.
    assert (model.weight.grad - expected).norm() < 1e-6 * expected.norm()
    shifted = torch.autograd.grad(F.cross_entropy(model(x), y.roll(1)), model.weight)[0]
    assert (model.weight.grad - shifted).norm() > 0.1 * expected.norm()  # the control


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_is_of_the_same_class_and_holds_its_examples(kind):
    x, y = tensors()
    batch = KINDS[kind](x, y)
    assert count_examples(take_examples(batch, 2, 5)) == 3
    piece = prepare_batch(take_examples(batch, 2, 5))
    assert type(piece) is type(batch)
    assert all(map(torch.equal, both(piece), (x[2:5], y[2:5])))
    assert all(map(torch.equal, both(batch), (x, y)))  # the batch itself is as it was
    assert len(pytree.list_leaves(batch)) == len(list(pytree.name_leaves(batch)))


def test_what_was_computed_from_the_whole_batch_is_computed_again():
    x, y = tensors()
    batch = Record(x, y)
    assert batch.total == pytest.approx(float(x.sum()))
    assert take_examples(batch, 0, 2).total == pytest.approx(float(x[:2].sum()))


def test_words_of_a_tokenizer_are_not_there_in_a_piece_rather_than_wrong():
    encodings = [SimpleNamespace(n_sequences=1)] * 7  # of the whole batch
    batch = transformers.BatchEncoding(fields(*tensors()), encodings)
    with pytest.raises(ValueError, match="is not available when using"):
        take_examples(batch, 2, 5).word_ids(0)


@pytest.mark.parametrize(
    "kind", ["batch encoding", "dataclass", "frozen dataclass", "proxy", "user dict"]
)
def test_data_of_any_class_are_columns(kind):
    model, (x, y) = linear(), tensors()
    data, order = KINDS[kind](x, y), ab.Order(7, batch_size=3, seed=0)
    for workers in (0, 1):
        if workers and kind == "proxy":
            with pytest.raises(TypeError, match="cannot pickle 'mappingproxy' object"):
                next(ab.batches(data, order, workers=workers))
            continue
        read = list(ab.batches(data, order, stop=3, workers=workers))
        for batch in read:
            assert type(batch.examples) is type(data)
            assert torch.equal(both(batch.examples)[0], x[batch.ids])
    for collate in (
        None,
        lambda examples: tuple(map(torch.stack, zip(*map(both, examples), strict=True))),
    ):
        result = ab.evaluate(model, ab.Objective(losses), data, micro_batch=2, collate=collate)
        assert result.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = ab.steps(model, ab.Objective(losses), optimizer, data, order=order, epochs=1)
    assert [step.gradient.num_examples for step in steps] == [3, 3, 1]


@pytest.mark.parametrize("kind", ["batch encoding", "dataclass", "frozen dataclass"])
def test_a_layout_is_judged_on_a_batch_of_any_class(kind):
    model, (x, y) = linear(), tensors()

    def step(micro_batches, *, share=True):
        model.zero_grad()
        for batch in micro_batches:
            count = len(both(batch)[1])
            (losses(model, batch).mean() * (count / 7 if share else 1)).backward()
        return model

    ab.assert_layout_invariant(step, KINDS[kind](x, y))
    with pytest.raises(AssertionError, match="depends on the layout"):  # the control
        ab.assert_layout_invariant(lambda parts: step(parts, share=False), KINDS[kind](x, y))


@pytest.mark.parametrize("workers", [0, 1])
def test_examples_that_are_dataclasses_are_stacked(workers):
    (x, y), order = tensors(), ab.Order(7, batch_size=3, seed=0)
    examples = [Record(x[i], int(y[i])) for i in range(7)]

    def double(example, key):
        return Record(2 * example.x, example.y)

    for data, transform, factor in (
        (examples, None, 1),
        (examples, double, 2),
        (Record(x, y), double, 2),
    ):
        for batch in ab.batches(data, order, stop=3, transform=transform, workers=workers):
            assert type(batch.examples) is Record
            assert torch.equal(batch.examples.x, factor * x[batch.ids])
            assert torch.equal(batch.examples.y, y[batch.ids])


# ----------------------------------------------------------------------------------- refusals


class Graph:
    """Batch like torch_geometric's: tensors in attributes, and a method that moves them."""

    def __init__(self, device="cpu"):
        self.device = device

    def to(self, device):
        return Graph(device)


X = torch.zeros(3, 2)
REFUSED = {
    "list of strings": (
        {"x": X, "text": ["a"] * 3},
        r"batch\['text'\]\[0\] is of type str.*collate",
    ),
    "one string": ({"x": X, "task": "sst2"}, r"batch\['task'\] is of type str.*ab\.Shared"),
    "number": ((X, 0.5), r"batch\[1\] is the number 0\.5 \(float\).*ab\.Shared"),
    "list of numbers": (
        (X, [0, 1, 2]),
        r"batch\[1\]\[0\] is the number 0 .* one tensor of shape \[B\]",
    ),
    "NumPy number": ((X, np.float32(2)), r"batch\[1\] is the number 2\.0 \(numpy.float32\)"),
    "0-d tensor": (Pair(X, torch.tensor(1)), r"batch\.y is a tensor of shape \(\)"),
    "0-d array": (Record(X, np.array(1)), r"batch\.y is a NumPy array of shape \(\)"),
    "lengths": (Record(X, X[:2]), r"batch\.x has 3, batch\.y has 2"),
    "encoding": (
        transformers.BatchEncoding({"input_ids": [[1, 2], [3]]}),
        r"batch\['input_ids'\]\[0\]\[0\] is the number 1",
    ),
    "images of one example each": (
        (X, [X[0], X[1], X[2]]),
        r"batch\[1\]\[0\] has 2.* Stack or pad",
    ),
    "set": ({"ids": {1, 2}}, r"batch\['ids'\] is of type set. It cannot be indexed by example"),
    "generator": (
        (X, (i for i in range(3))),
        r"batch\[1\] is of type generator. It cannot be indexed",
    ),
    "object": (
        {"graph": Graph()},
        r"batch\['graph'\] is of type test_pytree.Graph.* collate=\.\.\.",
    ),
    "packed": ((X, pack_sequence([X])), r"batch\[1\] is of type .*PackedSequence"),
    "loader": (
        DataLoader(TensorDataset(X)),
        r"batch is of type torch\.utils\.data\.\w+\.DataLoader",
    ),
    "nothing": ([], "of type list, holds no tensor and no array"),
    "None": (None, "of type NoneType, holds no tensor and no array"),
    "class": (Record, r"batch is of type type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_examples_is_refused_by_name(name):
    batch, message = REFUSED[name]
    model = nn.Linear(2, 1)

    def step(micro_batches):
        raise AssertionError("not reached")

    objective = ab.Objective(lambda model, batch: model(X)[:, 0])
    with pytest.raises(BatchError, match=message):
        ab.batch_gradient(model, objective, batch)
    with pytest.raises(BatchError, match=message):
        ab.assert_layout_invariant(step, batch)


def encode(x):
    return x * torch.ones(2, requires_grad=True)


UNCUT = {
    "graph": (lambda: encode(X), r"batch has a graph behind it \(MulBackward0\).*detach\(\)"),
    "graph inside": (
        lambda: (X, Record(X, encode(X))),
        r"batch\[1\]\.y has a graph behind it",
    ),
    "sparse": (lambda: {"adj": X.to_sparse()}, r"batch\['adj'\] is a sparse tensor .*to_dense"),
    "jagged": (
        lambda: torch.nested.nested_tensor([X[:1], X[:2], X], layout=torch.jagged),
        r"batch is a nested tensor.*to_padded_tensor",
    ),
}


@pytest.mark.parametrize("name", UNCUT)
def test_what_cannot_be_cut_is_refused_by_name_in_micro_batches_alone(name):
    make, message = UNCUT[name]
    model = nn.Linear(2, 1)
    objective = ab.Objective(lambda model, batch: model(X)[:, 0])
    ab.batch_gradient(model, objective, make())
    with pytest.raises(BatchError, match=message):
        ab.batch_gradient(model, objective, make(), layout=ab.Layout(micro_batch=2))


def test_a_leaf_that_requires_a_gradient_is_cut_into_leaves_of_their_own():
    x = torch.randn(6, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))

    def penalise(model, batch):
        score = model(batch).tanh().sum(1)
        (slope,) = torch.autograd.grad(score.sum(), batch, create_graph=True)
        return score + slope.square().sum(1)

    result = {}
    for micro_batch in (None, 4, 1):
        model = linear()
        layout = ab.Layout(micro_batch=micro_batch)
        ab.batch_gradient(model, ab.Objective(penalise), x, layout=layout)
        result[micro_batch] = model.weight.grad
    model = linear()
    expected = torch.autograd.grad(penalise(model, x).mean(), model.weight)[0]
    for gradient in result.values():
        assert (gradient - expected).norm() < 1e-6 * expected.norm()  # float32


def test_tensors_of_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        x, y = (part.clone() for part in tensors())
    model = linear()
    for micro_batch in (None, 3):
        layout = ab.Layout(micro_batch=micro_batch)
        ab.batch_gradient(model, ab.Objective(losses), (x, y), layout=layout)
        x2, y2 = tensors()
        expected = torch.autograd.grad(F.cross_entropy(model(x2), y2), model.weight)[0]
        assert (model.weight.grad - expected).norm() < 1e-6 * expected.norm()


def test_objects_of_a_collate_move_to_the_device_by_themselves():
    moved = prepare_batch({"graph": Graph(), "x": X}, torch.device("meta"))
    assert moved["graph"].device == torch.device("meta")
    assert prepare_batch(pack_sequence([X]), torch.device("meta")).data.device.type == "meta"


def test_a_loader_in_the_place_of_a_batch_is_told_to_be_one() -> None:
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)
    with pytest.raises(BatchError, match="Pass one of its batches"):
        count_examples(loader)
