"""Changes by the loop's body come back on a resume: freezing, modes, values, groups, draws.

Oracle: the same training in one go. Control: half of it ends elsewhere, and so does the whole of it
with a body that does nothing.
"""

import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab
from anybatch.errors import RunError


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Tuned(nn.Module):
    """A layer whose arithmetic depends on attributes of many kinds."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0
        self.mode = "plain"
        self.weights = [1.0, 2.0]
        self.by_name = {"scale": 1.0}
        self.scale = torch.tensor(1.0)
        self.config = SimpleNamespace(gain=1.0)
        self.inner = Inner()
        self.activation = torch.tanh
        self.cache, self.calls = None, 0

    def forward(self, x):
        self.cache, self.calls = x.detach(), self.calls + 1
        x = x * self.temperature * self.weights[1] * self.by_name["scale"] * self.scale
        x = x * self.config.gain * self.inner.settings.gain
        return self.activation(x) if self.mode == "plain" else torch.relu(x)


class Inner:
    """An object of the user's that holds another."""

    def __init__(self):
        self.settings = SimpleNamespace(gain=1.0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.2), Tuned(), nn.LayerNorm(4), nn.Linear(4, 3)
    )


def unfreeze(model, optimizer, t):
    if t == 1:
        model[0].requires_grad_(True)


def freeze(model, optimizer, t):
    model[0].requires_grad_(t < 1)


def evaluate_from_then_on(model, optimizer, t):
    if t == 1:
        model[1].eval()  # dropout ends


def lower_the_dropout(model, optimizer, t):
    if t == 1:
        model[1].p = 0.1


def exchange_the_dropout(model, optimizer, t):
    if t == 1:
        model[1] = nn.Dropout(0.5)


def raise_eps(model, optimizer, t):
    model[3].eps = 0.1 * min(t, 4)


def cool(model, optimizer, t):
    model[2].temperature *= 0.9


def switch(model, optimizer, t):
    if t == 2:
        model[2].mode = "relu"


def change_a_list(model, optimizer, t):
    model[2].weights[1] *= 0.9


def change_a_dict(model, optimizer, t):
    model[2].by_name["scale"] += 0.1


def change_a_tensor(model, optimizer, t):
    model[2].scale.mul_(0.9)


def replace_a_tensor(model, optimizer, t):
    model[2].scale = model[2].scale * 0.9


def change_a_configuration(model, optimizer, t):
    model[2].config.gain *= 0.9


def exchange_a_configuration(model, optimizer, t):
    model[2].config = SimpleNamespace(gain=0.9**t)


def change_an_inner_object(model, optimizer, t):
    model[2].inner.settings.gain *= 0.9


def set_a_rate(model, optimizer, t):
    optimizer.param_groups[0]["lr"] *= 0.9


def set_a_momentum(model, optimizer, t):
    optimizer.param_groups[0]["momentum"] = 0.1 * min(t, 4)


def add_a_group(model, optimizer, t):
    if t == 1:
        optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.3})


def move_between_groups(model, optimizer, t):
    if t == 1:
        (bias,) = [p for p in optimizer.param_groups[0]["params"] if p is model[0].bias]
        optimizer.param_groups[0]["params"] = [
            p for p in optimizer.param_groups[0]["params"] if p is not bias
        ]
        optimizer.add_param_group({"params": [bias], "lr": 0.5, "weight_decay": 0.1})


def draw_by_torch(model, optimizer, t):
    with torch.no_grad():
        model[4].weight.add_(0.01 * torch.randn_like(model[4].weight))


def draw_by_numpy(model, optimizer, t):
    with torch.no_grad():
        model[4].weight.add_(0.01 * float(np.random.standard_normal()))  # noqa: NPY002


def draw_by_random(model, optimizer, t):
    with torch.no_grad():
        model[4].weight.add_(0.01 * random.gauss(0, 1))


BODIES = [
    *(unfreeze, freeze, evaluate_from_then_on),
    *(lower_the_dropout, exchange_the_dropout, raise_eps, cool, switch),
    *(change_a_list, change_a_dict, change_a_tensor, replace_a_tensor),
    *(change_a_configuration, exchange_a_configuration, change_an_inner_object),
    *(set_a_rate, set_a_momentum, add_a_group, move_between_groups),
    *(draw_by_torch, draw_by_numpy, draw_by_random),
]


def train(body, epochs, folder, *, seed=1, bitwise=False, model=None):
    model = network() if model is None else model
    model[0].requires_grad_(body is not unfreeze)
    some_parameters = list(model.parameters())[: -2 if body is add_a_group else None]
    optimizer = torch.optim.SGD(some_parameters, lr=0.1, momentum=0.5)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    steps = ab.steps(
        model,
        ab.Objective(losses, grain=2),
        optimizer,
        data(),
        order=ab.Order(12, batch_size=4, seed=0),
        epochs=epochs,
        run=folder,
        bitwise=bitwise,
    )
    for step in steps:
        body(model, optimizer, step.step)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.fast(1)
@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_what_the_body_changes_comes_back(body, bitwise, tmp_path):
    whole = train(body, 3, tmp_path / "whole", bitwise=bitwise)
    half = train(body, 2, tmp_path / "resumed", bitwise=bitwise)
    nothing = train(lambda *_: None, 3, tmp_path / "nothing", bitwise=bitwise)
    assert not torch.equal(half, whole)  # the control
    assert not torch.equal(nothing, whole)
    resumed = train(body, 3, tmp_path / "resumed", seed=2, bitwise=bitwise)  # other draws before
    assert torch.equal(resumed, whole)


def test_a_run_that_is_resumed_twice_keeps_what_was_changed_before_the_first(tmp_path):
    whole = train(lower_the_dropout, 4, tmp_path / "whole")
    for epochs in (1, 2, 4):
        resumed = train(lower_the_dropout, epochs, tmp_path / "resumed")
    assert torch.equal(resumed, whole)


def add_a_module(model, optimizer, t):
    model.append(nn.Identity())


def replace_a_module(model, optimizer, t):
    model[1] = nn.AlphaDropout(0.2)


def replace_a_function(model, optimizer, t):
    model[2].activation = torch.relu


def train_a_stranger(model, optimizer, t):
    if t == 0:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


LOST = {
    add_a_module: r"changed the module '5' of the model from none to Identity",
    replace_a_module: r"changed the module '1' of the model from Dropout to AlphaDropout",
    replace_a_function: r"set 2\.activation of the model to another builtin_function_or_method",
    train_a_stranger: "a parameter that is not the model's",
}


@pytest.mark.parametrize("body", LOST, ids=lambda body: body.__name__)
def test_what_no_checkpoint_can_hold_is_refused_at_the_first(body, tmp_path):
    with pytest.raises(RunError, match=LOST[body]):
        train(body, 3, tmp_path)
    assert not list(tmp_path.glob("checkpoints/step-*"))
    train(body, 3, None)  # without a run there is nothing to come back


def test_an_object_that_cannot_be_kept_is_told_once(tmp_path, caplog):
    def body(model, optimizer, t):
        model[2].helper = object()

    with caplog.at_level(logging.WARNING):
        train(body, 3, tmp_path)
    (results,) = [row.getMessage() for row in caplog.records]
    assert "has set 2.helper of the model to another object, which no checkpoint holds" in results


def test_what_the_forward_pass_keeps_for_itself_is_in_no_checkpoint(tmp_path, caplog):
    def evaluate(model, optimizer, t):
        model(data()[0][:3])  # another cache, and one call more

    with caplog.at_level(logging.WARNING):
        train(evaluate, 1, tmp_path)
    assert not caplog.records
    (path,) = tmp_path.glob("checkpoints/step-*/body.pt")
    assert torch.load(path, weights_only=True)["attributes"] == {}


def test_values_that_nobody_changed_are_those_of_the_model_as_it_is_built_again(tmp_path):
    train(cool, 1, tmp_path)
    model = network()
    model[1].p = 0.0
    train(cool, 2, tmp_path, model=model)
    assert model[1].p == 0.0
    assert model[2].temperature == pytest.approx(0.9**6)


@pytest.mark.parametrize("changed_at", [0, 1, 3])
@pytest.mark.parametrize("name", ["p", "training", "temperature"])
def test_plain_values_that_change_late_come_back(tmp_path, name, changed_at):
    """Where all values of a model are plain, they are compared as objects, and not read."""
    new = {"p": 0.25, "training": False, "temperature": 3.0}[name]

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.75), nn.Linear(5, 3))
        model[1].temperature = 1.0
        return model

    def go(model, number):
        loop = ab.steps(
            model,
            ab.Objective(losses, grain=4),
            torch.optim.SGD(model.parameters(), lr=0.1),
            data(),
            order=ab.Order(12, batch_size=4),
            steps=6,
            run=ab.Run(tmp_path / "run", checkpoint_every=1),
        )
        for step in loop:
            if step.step == changed_at:
                setattr(model[1], name, new)
            if step.step + 1 == number:
                break
        loop.close()

    model = make()
    go(model, changed_at + 2)
    assert getattr(model[1], name) == new
    again = make()
    assert getattr(again[1], name) != new
    go(again, 6)
    assert getattr(again[1], name) == new


class Late(nn.Module):
    """A layer whose forward pass sets a value late, and once. All else in it stays as it is."""

    calls = 0  # of the class: a number that changes in the module would be seen at each pass

    def __init__(self):
        super().__init__()
        self.cache, self.inner = None, nn.Linear(4, 3)

    def forward(self, x):
        Late.calls += 1
        if Late.calls == Late.number:
            self.cache = Late.value[0]
        return self.inner(x)


@pytest.mark.parametrize("value", [torch.tanh, object(), 1.5], ids=["function", "object", "number"])
@pytest.mark.parametrize("number", [1, 4])
def test_what_a_forward_pass_sets_late_is_not_blamed_on_the_body(
    tmp_path, caplog, monkeypatch, value, number
):
    for name, setting in (("calls", 0), ("value", [value]), ("number", number)):
        monkeypatch.setattr(Late, name, setting, raising=False)
    model, run = Late(), ab.Run(tmp_path / "run", checkpoint_every=1)
    caplog.set_level(logging.WARNING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"order": ab.Order(12, batch_size=4), "steps": 6, "run": run, "self_check": False}
    for step in ab.steps(model, ab.Objective(losses), optimizer, data(), **how):
        assert (model.cache is None) == (step.step + 1 < number)
    assert "body" not in caplog.text
