"""What strangers pass by mistake, for every argument: one error that names it, and says what to do.

Each argument of each function is given values of several wrong types. The control is that the
right ones go through, and that every refusal is of the library's own class.
"""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import anybatch as ab
from anybatch.errors import AnybatchError, BatchError, DataError, LossError, ModelError

pd = pytest.importorskip("pandas")

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def update(**given):
    model = given.pop("model", None) or linear()
    objective = given.pop("objective", None) or ab.Objective(cross_entropy)
    return ab.batch_gradient(model, objective, (X, Y), **given)


def train(**given):
    model = given.pop("model", None) or linear()
    optimizer = given.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    objective = given.pop("objective", None) or ab.Objective(cross_entropy)
    data = given.pop("data", (X, Y))
    how = {"order": ab.Order(12, batch_size=5), "epochs": 1} | given
    return list(ab.steps(model, objective, optimizer, data, **how))


def evaluate(**given):
    objective = given.pop("objective", None) or ab.Objective(cross_entropy)
    return ab.evaluate(linear(), objective, given.pop("data", (X, Y)), **given)


def scheduler(kind=StepLR, argument=3):
    return kind(torch.optim.SGD(linear().parameters(), lr=0.1), argument)


UPDATE = {
    "layout": [4, "auto", [4, 8], {"micro_batch": 3}, ab.Layout],
    "observe": [True, "norms", ["norms"], ab.Observe],
    "clip": [1.0, "norm", ab.ClipNorm, nn.utils.clip_grad_norm_],
    "group": [3, "world", True],
    "bitwise": ["yes", None, 1],
    "precision": ["fp16", torch.float16, None, True],
}
ALONE = {
    "key": [3, (0, 1), "seed", torch.Generator()],
    "ids": [[1, 2], np.arange(12.0), ["a"] * 12, "ids", torch.ones(12, dtype=torch.bool)],
    "loss_scale": [0, -1.0, "a", None, float("nan"), float("inf")],
    "reduction_state": ["x", 3, [None]],
    "objective": [cross_entropy, ab.Objective, "mean"],
    "model": [cross_entropy, nn.Linear, [linear()]],
}
LOOP = {
    "order": [None, 4, [0, 1], RandomSampler(range(12))],
    "epochs": [0, -1, 1.5, "3", None, True],
    "collate": ["pad", 3, [ab.Pad()]],
    "transform": ["flip", 3],
    "workers": [1.5, -1, "2", None],
    "schedule": [0.1, "cosine", ab.Constant, lambda a, b: 0.1, lambda examples: None],
    "state": [["a"], "x", torch.optim.SGD(linear().parameters(), lr=0.1)],
    "run": [3, True, b"x", ["a"]],
    "compare_every": [0, -1, 1.5, "a"],
    "shard": ["yes", None, 1],
    "optimizer": [torch.optim.SGD, "adam", list(linear().parameters()), scheduler()],
}
EVALUATION = {
    "micro_batch": [0, -1, 1.5, "auto", None],
    "collate": ["pad", 3],
    "precision": ["half", None],
    "group": [3, "world"],
    "objective": [cross_entropy, ab.Objective],
}


def cases(*tables):
    return [(name, value) for table in tables for name, values in table.items() for value in values]


def refused(function, name, value):
    with pytest.raises(AnybatchError, match=r"\w{3,}") as caught:
        function(**{name: value})
    told = str(caught.value)
    assert name.rstrip("s") in told or name in ("epochs", "compare_every", "ids")
    assert 30 < len(told) < 500


def named(value):
    """A name that is the same in every process: no address in memory."""
    return re.sub(r" at 0x\w+", "", str(value))


@pytest.mark.parametrize(("name", "value"), cases(UPDATE, ALONE), ids=named)
def test_batch_gradient_refuses_arguments_of_the_wrong_type(name, value):
    refused(update, name, value)


@pytest.mark.parametrize(("name", "value"), cases(UPDATE, LOOP), ids=named)
def test_steps_refuse_arguments_of_the_wrong_type(name, value):
    refused(train, name, value)


@pytest.mark.parametrize(("name", "value"), cases(EVALUATION), ids=named)
def test_evaluate_refuses_arguments_of_the_wrong_type(name, value):
    refused(evaluate, name, value)


def test_the_right_arguments_go_through():  # the control
    gradient = update(
        key=ab.Key(0, np.int64(1)),
        layout=ab.Layout(micro_batch=np.int64(4)),
        observe=ab.Observe(),
        clip=ab.ClipNorm(np.float32(1.0)),
        ids=range(12),
        loss_scale=np.float64(2.0),
        reduction_state={},
    )
    schedules = [None, ab.Cosine(0.1, 24), lambda examples: torch.tensor(0.1), lambda n, lr=0.1: lr]
    for schedule in schedules:
        train(schedule=schedule, state={"note": nn.Linear(1, 1)})
    assert gradient.is_finite
    assert evaluate(micro_batch=np.int64(5)) == evaluate(micro_batch=5)


def test_a_clip_that_is_a_number_clips_nothing_silently_no_more():
    with pytest.raises(LossError, match=r"clip is 1\.0\. It must be ab\.ClipNorm\(max_norm\)"):
        update(clip=1.0)


# ----------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("kind", [(StepLR, 3), (LambdaLR, lambda step: 1.0)])
def test_a_scheduler_of_torch_is_told_what_to_write(kind):
    with pytest.raises(AnybatchError, match=r"StepLR|LambdaLR") as caught:
        train(schedule=scheduler(*kind))
    assert "from the number of examples used so far to a learning rate" in str(caught.value)
    assert "call its step() in the body of the loop" in str(caught.value)


def test_the_advice_for_a_scheduler_of_torch_works():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch_scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    rates = []
    for step in ab.steps(
        model,
        ab.Objective(cross_entropy),
        optimizer,
        (X, Y),
        order=ab.Order(12, batch_size=4),
        epochs=1,
        state={"scheduler": torch_scheduler},
    ):
        rates.append(step.lr)
        torch_scheduler.step()
    assert rates == [0.1, 0.05, 0.025]


@pytest.mark.parametrize("rate", [None, "a", float("nan"), -0.1, float("inf"), [0.1]])
def test_a_schedule_that_gives_no_rate_is_refused(rate):
    with pytest.raises(ModelError, match="the schedule gave the learning rate"):
        train(schedule=lambda examples: rate)


# --------------------------------------------------------------------------- several optimisers


def test_several_optimisers_are_told_of_parameter_groups():
    model = linear()
    parts = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with pytest.raises(ModelError, match=r"optimizer is a list. .*parameter groups"):
        train(model=model, optimizer=parts)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-3}]
    train(model=model, optimizer=torch.optim.AdamW(groups))  # the advice


# ------------------------------------------------------------------------------ data and examples


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
    found = evaluate(data=data, collate=collate, objective=ab.Objective(losses)).loss
    assert found == pytest.approx(expected, rel=1e-6)  # float32
    steps = train(data=data, collate=collate, objective=ab.Objective(losses))
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


# ------------------------------------------------------------------------- numbers and objectives

NUMBERS = [ab.L2, ab.L1, ab.ClipNorm, ab.ClipExamples, ab.TopFraction, ab.Tilted, ab.GroupDRO]


@pytest.mark.parametrize("kind", [*NUMBERS, ab.Constant])
@pytest.mark.parametrize("value", ["a", None, [0.1], 1j, float("nan"), True, torch.tensor(0.5)])
def test_what_is_no_number_is_refused(kind, value):
    with pytest.raises(AnybatchError, match=kind.__name__):
        kind(value)
    assert kind(np.float32(0.5)) == kind(0.5)


def losses_with(**more):
    def losses(model, batch):
        values = cross_entropy(model, batch)
        return ab.ExampleLosses(values, **{name: make(values) for name, make in more.items()})

    return ab.Objective(losses)


OBJECTIVES = {
    "module": (
        lambda: ab.Objective(nn.CrossEntropyLoss(reduction="none")),
        "example_losses is Cross",
    ),
    "string": (lambda: ab.Objective("mse"), "example_losses is 'mse'.*function of"),
    "torch.mean": (lambda: ab.Objective(cross_entropy, torch.mean), "takes a tensor"),
    "sum of reductions": (lambda: ab.Mean() + ab.Max(), r"Mean\(\) \+ Max\(\) is no reduction"),
    "text times": (lambda: "a" * ab.Mean(), "finite factor for Mean"),
    "penalty and number": (lambda: ab.L2(0.1) + 3, "A penalty was added to 3"),
    "drops": (lambda: ab.StepDecay(0.1, at=5), "at to be numbers of examples, got 5"),
    "pattern": (lambda: ab.L2(0.1, on=3), "on to be a pattern"),
    "counts in the graph": (lambda: losses_with(counts=lambda v: v.exp()), "part of the graph"),
    "complex counts": (lambda: losses_with(counts=lambda v: 1j * v.detach()), "are complex"),
    "metrics": (lambda: losses_with(metrics=lambda v: [v]), "metrics .* of type list"),
    "sparse": (lambda: ab.Objective(lambda m, b: cross_entropy(m, b).to_sparse()), "layout"),
    "key": (lambda: ab.Key("a", 0), r"Key\(seed='a', step=0\) is no key"),
    "observe": (lambda: ab.Observe(norms="all"), "Observe expects norms to be True or False"),
    "memory": (lambda: ab.Layout(micro_batch="auto", memory_bytes="1GB"), "memory_bytes is '1GB'"),
    "at most": (lambda: ab.Layout(micro_batch="auto", at_most=0), "at_most is 0"),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_of_wrong_parts_is_refused(kind):
    make, message = OBJECTIVES[kind]
    with pytest.raises(AnybatchError, match=message):
        update(objective=make())
