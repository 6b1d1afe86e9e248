"""Updates that cannot be compiled: refused with the cause, or plain under "auto".

Oracle: the same training by plain updates, with the same bits.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import anybatch as ab
from anybatch.errors import ModelError
from anybatch.training import compiled_updates, whole_update
from anybatch.training.compile_obstacles import find_obstacle
from compiled_training import ORDER, data, losses, network, sgd, train


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch, tmp_path):
    torch._dynamo.reset()
    monkeypatch.setattr(whole_update, "BACKEND", "eager")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, inputs):
        return self.network(inputs + torch.randn_like(inputs))


class Counts(nn.Module):
    """A network that writes into a buffer."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return self.network(inputs)


class Numbers(nn.Module):
    """A network that counts its passes in a Python attribute."""

    def __init__(self):
        super().__init__()
        self.network, self.passes = network(), 0

    def forward(self, inputs):
        self.passes += 1
        return self.network(inputs)


class Branches(nn.Module):
    """A network whose operations depend on the values of its inputs."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, inputs):
        return self.network(inputs if inputs.sum() > -100 else -inputs)


class OwnOptimizer(torch.optim.SGD):
    pass


def with_hook():
    model = network()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model


def with_tensor_hook():
    class Watches(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.gradients = network(), []

        def forward(self, inputs):
            outputs = self.network(inputs)
            outputs.register_hook(self.gradients.append)
            return outputs

    return Watches()


def with_step_hook(parameters):
    optimizer = sgd(parameters)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def with_other_step(parameters):
    optimizer = sgd(parameters)
    optimizer.step = partial(type(optimizer).step, optimizer)
    return optimizer


critic = network()


def with_critic(model, batch):
    return losses(model, batch).values + critic(batch[0]).square().sum(1)


def with_layer(layer):
    return lambda: nn.Sequential(network(), copy.deepcopy(layer))


def with_names(examples):
    return *torch.utils.data.default_collate(examples), np.array(["name"] * len(examples))


REFUSALS = {
    "dropout": ({"model": with_layer(nn.Dropout(0.5))}, "the Dropout '1' draws random numbers"),
    "batch norm": (
        {"model": with_layer(nn.BatchNorm1d(3, dtype=torch.float64))},
        "the BatchNorm1d '1' couples examples",
    ),
    "draws": ({"model": Draws}, "the model draws random numbers"),
    "buffer": ({"model": Counts}, "writes into a buffer"),
    "attribute": ({"model": Numbers}, "changes the attribute 'passes'"),
    "tensor hook": ({"model": with_tensor_hook}, "Unsafe side effect"),
    "hook of the step": ({"optimizer": with_step_hook}, "SGD has hooks on its step"),
    "another step": ({"optimizer": with_other_step}, "the method step of this SGD was replaced"),
    "branch": ({"model": Branches}, "Unsupported: Data-dependent branching"),
    "hook": ({"model": with_hook}, "the parameter 0.weight has a hook"),
    "outside": ({"objective": ab.Objective(with_critic)}, "modules besides the model: critic"),
    "reduction": ({"objective": ab.Objective(losses, ab.Max())}, r"Max\(\) of the term 'data'"),
    "observe": ({"observe": ab.Observe(norms=True)}, "observe= is set"),
    "spikes": ({"spikes": ab.SpikeWatch(20)}, "spikes= is set"),
    "clip": ({"clip": ab.ClipExamples(1.0)}, "needs the gradient of each example"),
    "layout": ({"layout": ab.Layout(micro_batch=4)}, "cuts batches into micro-batches"),
    "precision": ({"precision": "bfloat16"}, "precision is 'bfloat16'"),
    "LBFGS": ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates the loss itself"),
    "own optimiser": ({"optimizer": OwnOptimizer}, "is not one of torch's"),
    "foreach": (
        {"optimizer": lambda p: torch.optim.SGD(p, 0.1, foreach=True)},
        "SGD was made with foreach=True",
    ),
    "batch": ({"collate": with_names}, "the batch holds a ndarray"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compiled_is_refused_with_the_cause(case, monkeypatch, caplog):
    options, match = REFUSALS[case]
    make = options.get("model", network)
    with pytest.raises(ModelError, match=f"compile=True cannot compile this training: .*{match}"):
        train(True, **options | {"model": make()})
    monkeypatch.setattr(compiled_updates.CompiledUpdates, "_is_worth", lambda self, step: True)
    plain = train(False, **options | {"model": make()})
    assert torch.equal(train("auto", **options | {"model": make()}), plain)
    assert 'compile="auto" goes on with plain updates' in caplog.text


@pytest.mark.parametrize(
    "register",
    [register_optimizer_step_pre_hook, register_optimizer_step_post_hook],
    ids=["before", "after"],
)
def test_a_hook_on_the_steps_of_all_optimisers_is_refused(register):
    handle = register(lambda *_: None)
    try:
        with pytest.raises(ModelError, match="the steps of all optimisers have hooks"):
            train(True)
    finally:
        handle.remove()
    train(True)  # the control: the hook of this library does not count


def test_a_frozen_weight_stays_frozen():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = sgd(model.parameters())
    updates = ab.steps(
        model, ab.Objective(losses), optimizer, data(), order=ORDER, steps=4, compile=True
    )
    for _ in updates:
        model[0].weight.grad = torch.ones_like(before)  # of somebody else
    assert torch.equal(model[0].weight, before)


def test_ranks_and_wrong_arguments_are_refused():
    options = {"clip": None, "observe": None, "group": object()}
    obstacle = find_obstacle(network(), ab.Objective(losses), None, options)
    assert (
        obstacle == "group= is set, and several ranks exchange gradients in the middle of an update"
    )
    for mode in (True, "auto"):
        with pytest.raises(ModelError, match="compile with bitwise=True"):
            train(mode, bitwise=True)
    with pytest.raises(ModelError, match="compile is 'yes'"):
        train("yes")


def test_a_setting_that_changes_at_each_update_is_refused(monkeypatch):
    monkeypatch.setattr(compiled_updates, "_MAX_WAITS", 4)
    model = network()
    optimizer = sgd(model.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=26)
    with pytest.raises(ModelError, match="a setting of the optimiser besides the learning rate"):
        train(True, model=model, optimizer=lambda _: optimizer, schedule=cycle)


def test_torch_compile_that_is_turned_off_is_named():
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ModelError, match="turned off, by TORCH_COMPILE_DISABLE"),
    ):
        train(True)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(whole_update, "BACKEND", "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="C\\+\\+ compiler"):
        train(True)
