"""Data that strangers pass: read rightly, or refused by the column's name with advice that works.

Oracle: the same examples as float32 and int64 tensors.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import anybatch as ab
from anybatch.errors import AnybatchError, BatchError, DataError

pd = pytest.importorskip("pandas")

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def train(data=(X, Y), losses=cross_entropy, collate=None, order=None):
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"order": order or ab.Order(12, batch_size=5), "epochs": 1, "collate": collate}
    return list(ab.steps(model, ab.Objective(losses), optimizer, data, **how))


def evaluate(data=(X, Y), losses=cross_entropy, collate=None):
    return ab.evaluate(linear(), ab.Objective(losses), data, collate=collate)


class Examples(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.make(index)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


ORDER = ab.Order(12, batch_size=8, seed=0)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)
WRONG_DATA = {
    "loader": (LOADER, r"a DataLoader.*data=loader\.dataset .* collate=loader\.collate_fn"),
    "frame": (pd.DataFrame(X.numpy()), r"a pandas DataFrame.* to_numpy|frame\[features\]"),
    "series": (pd.Series(range(12)), "a pandas Series"),
    "path": ("data.csv", "The data are a str. Read the file first"),
    "iterator": (iter([1]), r"pass list\(data\)"),
    "set": ({1, 2}, r"pass list\(data\)"),
    "None": (None, "of type NoneType, without a length"),
    "number": (3, "of type int, without a length"),
    "class": (TensorDataset, "of type type, without a length"),
    "objects": ((X, np.array([1] * 12, object)), r"data\[1\] is an array of object"),
    "strings": ({"x": X, "y": np.array(["a"] * 12)}, r"data\['y'\] is an array of <U1"),
    "dates": ((X, np.zeros(12, "M8[s]")), r"data\[1\] is an array of datetime64"),
    "lists": ((X.tolist(), Y.tolist()), r"data\[0\]\[0\]\[0\] is of type float"),
    "0-d": (torch.tensor(3.0), r"data is a tensor of shape \(\)"),
    "PIL": (Examples(lambda i: (object(), 1)), "cannot be stacked into a batch.*collate="),
    "None examples": (Examples(lambda i: None), "cannot be stacked into a batch.*collate="),
    "ragged": (Examples(lambda i: torch.ones(i + 1)), r"cannot be stacked .* ab\.Pad\(\)"),
    "other keys": (Examples(lambda i: {str(i): 1}), "cannot be stacked into a batch"),
}


@pytest.mark.parametrize("kind", WRONG_DATA)
@pytest.mark.parametrize("function", [train, evaluate])
def test_data_that_cannot_be_read_are_refused(function, kind):
    data, message = WRONG_DATA[kind]
    with pytest.raises((DataError, BatchError), match=message):
        function(data=data)


LOADERS = {
    "steps": (
        lambda: train(data=LOADER),
        r"data=loader\.dataset.*batch_sampler=order\.sampler\(\)",
    ),
    "evaluate": (lambda: evaluate(data=LOADER), r"data=loader\.dataset"),
    "order": (
        lambda: train(order=LOADER),
        r"order is .*ab\.Order\(len\(data\), batch_size=\.\.\.\)",
    ),
    "sampler": (lambda: train(order=ORDER.sampler()), r"ab\.Order.*a loader or sampler is none"),
    "batches": (lambda: next(ab.batches(LOADER, ORDER)), r"data=loader\.dataset"),
    "update": (
        lambda: ab.batch_gradient(linear(), ab.Objective(cross_entropy), LOADER),
        "It is a loader. Pass one of its batches: for batch in loader",
    ),
    "micro-batches": (lambda: ab.MicroBatches(LOADER), "takes the batches of one update in a list"),
    "Order": (lambda: ab.Order(LOADER, batch_size=4), r"len\(loader\.dataset\)"),
}


@pytest.mark.parametrize("place", LOADERS)
def test_a_loader_in_the_wrong_place_is_refused_with_a_way_that_works(place):
    call, message = LOADERS[place]
    with pytest.raises(AnybatchError, match=message):
        call()


def test_the_ways_that_the_messages_name():
    loader = DataLoader(LOADER.dataset, batch_sampler=ORDER.sampler())
    objective = ab.Objective(cross_entropy)
    assert [ab.batch_gradient(linear(), objective, batch).num_examples for batch in loader] == [
        8,
        4,
    ]
    batches = ab.MicroBatches(list(LOADER))
    assert ab.batch_gradient(linear(), objective, batches).num_examples == 12
    assert len(ab.Order(len(LOADER.dataset), batch_size=4).indices(0)) == 4


def test_strings_of_examples_are_named_and_collate_helps():
    data = Examples(lambda i: {"text": "ab" * i, "y": i % 3})
    with pytest.raises(BatchError, match=r"batch\['text'\]\[0\] is of type str.*collate="):
        train(data=data)

    def collate(examples):
        x = torch.tensor([[float(len(example["text"]))] * 4 for example in examples])
        return x, torch.tensor([example["y"] for example in examples])

    assert len(train(data=data, collate=collate)) == 3
    assert evaluate(data=data, collate=collate).num_examples == 12


RIGHT_DATA = {
    "a loader's parts": (LOADER.dataset, LOADER.collate_fn),
    "read-only arrays": ((read_only(X.numpy()), read_only(Y.numpy())), None),
    "read-only examples": (Examples(lambda i: (read_only(X[i].numpy()), int(Y[i]))), None),
    "big-endian arrays": ((X.numpy().astype(">f4"), Y.numpy().astype(">i8")), None),
    "big-endian examples": (Examples(lambda i: (X[i].numpy().astype(">f4"), int(Y[i]))), None),
    "NumPy numbers": (Examples(lambda i: (X[i], np.int64(Y[i]))), None),
    "lists of columns": ([(X[i], Y[i]) for i in range(12)], None),
    "dict of columns": ({"x": X, "y": Y}, None),
}


@pytest.mark.parametrize("kind", RIGHT_DATA)
def test_arrays_of_any_kind_are_read_without_a_warning(kind):
    data, collate = RIGHT_DATA[kind]

    def losses(model, batch):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(model(x), y, reduction="none")

    expected = evaluate().loss
    result = evaluate(data=data, collate=collate, losses=losses).loss
    assert result == pytest.approx(expected, rel=1e-6)  # float32
    steps = train(data=data, collate=collate, losses=losses)
    assert [step.loss for step in steps] == pytest.approx([s.loss for s in train()], rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X.numpy().astype(float), Y), r"batch\[0\] is torch\.float64, batch\[1\] is torch\.int64"),
        ((X.long(), Y), r"batch\[0\] is torch\.int64.*the weights are torch\.float32"),
        ((X, Y.int()), r"batch\[1\] is torch\.int32.*Convert the batch"),
    ],
)
def test_types_that_torch_does_not_mix_are_listed(batch, message):
    batch = torch.as_tensor(batch[0]), batch[1]
    for micro_batch in (None, 5):
        with pytest.raises(BatchError, match=message):
            ab.batch_gradient(
                linear(),
                ab.Objective(cross_entropy),
                batch,
                layout=ab.Layout(micro_batch=micro_batch),
            )
    with pytest.raises(BatchError, match=message):
        train(data=batch)
    with pytest.raises(BatchError, match=message):
        evaluate(data=batch)


def test_memory_maps_are_read_without_a_warning(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert evaluate(data=(x, Y)).loss == pytest.approx(evaluate().loss, rel=1e-6)
    rows = [(x[i], int(Y[i])) for i in range(12)]
    assert evaluate(data=rows).loss == pytest.approx(evaluate().loss, rel=1e-6)
    padded, _ = ab.Pad()(rows[:2])
    assert torch.equal(padded.values, X[:2])
    swapped, _ = ab.Pad()([(X[0].numpy().astype(">f4"), 1)])
    assert torch.equal(swapped.values[0], X[0])
