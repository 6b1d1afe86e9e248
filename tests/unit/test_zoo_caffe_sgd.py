"""Caffe's momentum against a NumPy loop, torch's, and a run that was interrupted."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import ModelError
from anybatch.zoo import CaffeSGD

RATES = [0.1, 0.1, 0.05, 0.05, 0.2, 0.01, 0.01]
GRADIENTS = np.random.default_rng(2).normal(size=(len(RATES), 2, 3))  # updates, parameters, numbers
START = np.random.default_rng(3).normal(size=(2, 3))


def caffe_by_hand(rates: list[float], momentum: float, decay: float) -> np.ndarray:
    """SGDSolver: Regularize, ComputeUpdateValue, Update; the second parameter is a bias."""
    weights, history = START.copy(), np.zeros_like(START)
    for rate, gradients in zip(rates, GRADIENTS, strict=True):
        for k, lr_mult in enumerate([1, 2]):
            diff = gradients[k] + decay * weights[k]
            history[k] = rate * lr_mult * diff + momentum * history[k]
            weights[k] = weights[k] - history[k]
    return weights


def path(make: Callable, rates: list[float], bias_factor: int = 2, **options: float) -> np.ndarray:
    """Return where an optimiser of torch's kind arrives."""
    weight, bias = (nn.Parameter(torch.from_numpy(row.copy())) for row in START)
    groups = [{"params": [weight]}, {"params": [bias], "lr": bias_factor * rates[0]}]
    optimizer = make(groups, lr=rates[0], **options)
    for rate, gradients in zip(rates, GRADIENTS, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.param_groups[1]["lr"] = bias_factor * rate
        weight.grad, bias.grad = (torch.from_numpy(row) for row in gradients)
        optimizer.step()
    return torch.stack([weight, bias]).detach().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


OPTIONS = {"momentum": 0.9, "weight_decay": 0.01}


def test_weights_go_where_caffe_takes_them() -> None:
    wanted = caffe_by_hand(RATES, 0.9, 0.01)
    assert distance(path(CaffeSGD, RATES, **OPTIONS), wanted) < 1e-14  # float64, 7 updates
    assert distance(path(CaffeSGD, RATES, momentum=0.9), wanted) > 1e-3  # control: no decay
    assert distance(path(CaffeSGD, RATES, 1, **OPTIONS), wanted) > 1e-3  # control: biases alike


def test_at_a_constant_rate_it_is_torchs_from_the_first_update_on() -> None:
    constant = [0.1] * len(RATES)
    ours, torchs = (path(make, constant, **OPTIONS) for make in (CaffeSGD, torch.optim.SGD))
    assert distance(ours, torchs) < 1e-14  # float64: lr enters at another place
    first = GRADIENTS[0, 0] + 0.01 * START[0]
    weight = nn.Parameter(torch.from_numpy(START[0].copy()))
    weight.grad = torch.from_numpy(GRADIENTS[0, 0])
    CaffeSGD([weight], lr=0.1, **OPTIONS).step()
    np.testing.assert_allclose(weight.detach(), START[0] - 0.1 * first, rtol=1e-14)


def test_when_the_rate_changes_it_is_not_torchs() -> None:
    ours, torchs = (path(make, RATES, **OPTIONS) for make in (CaffeSGD, torch.optim.SGD))
    assert distance(torchs, ours) > 1e-2


@pytest.mark.parametrize(("make", "way"), [(CaffeSGD, 0.9 * 0.1), (torch.optim.SGD, 0.9 * 0.01)])
def test_after_a_drop_the_old_velocity_goes_on_at_the_old_rate(make: Callable, way: float) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.item()
    optimizer.param_groups[0]["lr"] = 0.01  # a tenth, and nothing pulls any more
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert before - weight.item() == pytest.approx(way, rel=1e-12)


def test_its_state_is_saved_and_loaded_with_weights_only() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = CaffeSGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = CaffeSGD([nn.Parameter(weight.detach().clone())], lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["momentum"] == 0.9
    (state,) = other.state.values()
    assert torch.equal(state["velocity"], torch.full((3,), 0.1))


def train_weights(epochs: int, run: Path, optimizer: Callable = CaffeSGD) -> torch.Tensor:
    """Return the weights after some epochs, begun or continued in a folder."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
    data = torch.arange(30.0).sin().reshape(10, 3), torch.arange(10) % 2
    for _ in ab.steps(
        model,
        ab.Objective(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")),
        optimizer(groups, lr=0.1, momentum=0.9),
        data,
        order=ab.Order(10, batch_size=4, seed=0),
        epochs=epochs,
        schedule=ab.StepDecay(0.1, 0.5, every=8),
        run=run,
    ):
        pass
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_does_not(tmp_path: Path) -> None:
    whole = train_weights(4, tmp_path / "whole")
    train_weights(2, tmp_path / "parts")
    assert torch.equal(train_weights(4, tmp_path / "parts"), whole)
    assert not torch.equal(train_weights(4, tmp_path / "torch", torch.optim.SGD), whole)  # control


def test_a_parameter_without_gradient_stays_and_costs_no_state() -> None:
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CaffeSGD([still, moved], lr=0.1, weight_decay=1.0)
    moved.grad = torch.zeros(2)
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    assert still not in optimizer.state
    assert moved.tolist() == pytest.approx([0.9, 0.9])  # it decays


@pytest.mark.parametrize(
    "option", [{"lr": -0.1}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}]
)
def test_values_out_of_range_are_refused(option: dict[str, float]) -> None:
    (name, value) = next(iter(option.items()))
    with pytest.raises(ModelError, match=f"CaffeSGD got .*{name} = {value}.* Expected"):
        CaffeSGD([nn.Parameter(torch.ones(1))], **option)
