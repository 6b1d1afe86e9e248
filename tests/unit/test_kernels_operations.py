"""Replacements of torch's operations: the same values and gradients.

Oracles: the equations in NumPy's float64; torch's own operation where bits must be equal.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import anybatch as ab
from anybatch.kernels import choice as kernels
from anybatch.kernels import operations as faster
from kernel_cases import ROUNDING, distance, forget, fresh, seeded

__all__ = ["fresh"]


@pytest.mark.parametrize("way", ["torch", "onednn"])
@pytest.mark.parametrize("shape", [(7, 20), (3, 5, 20), (2, 3, 4, 20)])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_linear_layer_has_the_gradients_of_its_equation(
    way: str, shape: tuple[int, ...], is_frozen: bool
) -> None:
    kernels.use(way)
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    w, b = torch.randn(6, 20), torch.randn(6)
    w.requires_grad_(not is_frozen), b.requires_grad_(not is_frozen)
    y = faster._Linear.apply(x, w, b)
    d = torch.randn(y.shape)
    y.relu_().backward(d)  # what follows may change it in place
    rows, weight = x.detach().reshape(-1, 20).double().numpy(), w.detach().double().numpy()
    pre = rows @ weight.T + b.detach().double().numpy()
    back = d.reshape(-1, 6).double().numpy() * (pre > 0)
    assert distance(y.reshape(-1, 6), pre * (pre > 0)) < ROUNDING
    assert x.grad is not None
    assert distance(x.grad.reshape(-1, 20), back @ weight) < ROUNDING
    assert distance(x.grad.reshape(-1, 20), d.reshape(-1, 6).numpy() @ weight) > 0.1  # control
    if is_frozen:
        assert w.grad is None
        assert b.grad is None
        return
    assert w.grad is not None
    assert b.grad is not None
    assert distance(w.grad, back.T @ rows) < ROUNDING
    assert distance(b.grad, back.sum(0)) < ROUNDING


@seeded
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(3, 7), st.integers(3, 7)),
    *(st.sampled_from(choices) for choices in [(1, 2, 3, (2, 3)), (None, 1, 2, (2, 1)), (0, 1)]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_max_pooling_is_torchs_bit_for_bit(
    shape: tuple[int, ...], kernel: Any, stride: Any, padding: int, ceil: bool, seed: int
) -> None:
    if kernel == 1:
        padding = 0
    make = torch.Generator().manual_seed(seed)
    x = torch.randint(4, shape, generator=make).float()  # many ties
    x[0, 0, 0, 0] = float("nan")
    how = {"stride": stride, "padding": padding, "ceil_mode": ceil}
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.max_pool2d(theirs, kernel, **how)
    for name in ("torch", "last"):
        kernels.choices.by_sizes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_choose", lambda _, ways, name=name: name)
            output = faster.max_pool2d(mine, kernel, **how)
        if name == "torch":
            assert output is None
            continue
        assert output is not None
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
        d = torch.randn(output.shape, generator=make)
        (g,) = torch.autograd.grad(output, mine, d)
        (g_expected,) = torch.autograd.grad(expected, theirs, d, retain_graph=True)
        assert torch.equal(g, g_expected)


def test_a_tie_goes_to_the_first_in_row_major_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_choose", lambda *_: "last")
    x = torch.ones(1, 2, 2, 2, requires_grad=True)
    output = faster.max_pool2d(x, 2)
    assert output is not None
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten(2).tolist() == [[[1, 0, 0, 0]] * 2]


class Model(nn.Module):
    """A convolution, pooling, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv(x).relu()).flatten(1)
        logits: Tensor = self.head(self.hidden(h).relu_())
        return logits


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Compute the gradients of a sum of squares."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", ["fastest", "torch", "onednn"])
def test_a_model_under_the_mode_has_the_gradients_that_it_has_without(way: str | None) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 1, 8, 8)
    expected = [g.double().numpy() for g in gradients(model.double(), x.double())]
    model.float()
    kernels.use(way)
    with faster.Faster() as mode:
        results = gradients(model, x)
    if way != "fastest":
        assert mode.is_useful is (way != "torch")
    assert len(results) == len(expected) == 6
    for g, right in zip(results, expected, strict=True):
        assert distance(g, right) < ROUNDING
        assert distance(g, 0.99 * right) > 100 * ROUNDING  # control


def test_the_mode_is_of_no_use_where_torchs_kernels_have_been_found_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Model(), torch.randn(6, 1, 8, 8)
    for name in ("torch", "onednn"):
        forget()
        monkeypatch.setattr(
            kernels, "_choose", lambda _, ways, name=name: name if name in ways else "torch"
        )
        for _ in range(3):  # from the first step on: what is computed does not depend on the step
            with faster.Faster() as mode:
                gradients(model, x)
            assert mode.is_useful is (name != "torch")


def test_the_mode_is_of_no_use_to_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 2**20)
    monkeypatch.setattr(faster, "SMALL", 2**20)
    model, x = Model(), torch.randn(6, 1, 8, 8)
    expected = gradients(model, x)
    with faster.Faster() as mode:
        results = gradients(model, x)
    assert not mode.is_useful
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_autocast_and_vmap_go_their_own_way_under_the_mode() -> None:
    model, x = Model(), torch.randn(6, 1, 8, 8)
    with faster.Faster(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    expected = model(x)
    with faster.Faster():
        each = torch.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(each, expected)


def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).square().sum(1)


def test_plain_steps_take_the_faster_kernels_where_they_are_of_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, batch = ab.Objective(losses), (torch.randn(6, 1, 8, 8),)
    entered: list[str] = []
    begin = faster.Faster.__enter__
    monkeypatch.setattr(faster.Faster, "__enter__", lambda self: entered.append("") or begin(self))
    by_way = {}
    for name in ("torch", "onednn"):
        torch.manual_seed(0)
        model = Model()
        forget()
        monkeypatch.setattr(
            kernels, "_choose", lambda _, ways, name=name: name if name in ways else "torch"
        )
        entered.clear()
        for _ in range(3):
            ab.batch_gradient(model, objective, batch)
        by_way[name] = len(entered), [p.grad.double().numpy() for p in model.parameters()]
    assert (by_way["torch"][0], by_way["onednn"][0]) == (1, 3)  # once to learn that it is of no use
    for mine, theirs in zip(by_way["onednn"][1], by_way["torch"][1], strict=True):
        assert distance(torch.from_numpy(mine), theirs) < ROUNDING
    kernels.use("torch")
    entered.clear()
    ab.batch_gradient(Model(), objective, batch)
    assert not entered


@pytest.mark.parametrize("way", ["torch", "onednn"])
def test_a_gradient_of_a_linear_layer_can_be_differentiated(way: str) -> None:
    """Compare second derivatives with torch's layer: its kernels compute them in every way."""
    kernels.use(way)
    torch.manual_seed(0)
    x = torch.randn(128, 128, requires_grad=True)  # large enough for a choice of kernels
    w, b = (torch.randn(shape, requires_grad=True) for shape in [(128, 128), (128,)])
    gradients_of_both = []
    for layer in (faster._Linear.apply, F.linear):
        y = layer(x, w, b).tanh()
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gradients_of_both.append(torch.autograd.grad(first.square().sum(), [x, w, b]))
    for gradient, true in zip(*gradients_of_both, strict=True):
        assert distance(gradient, true.double().numpy()) < 10 * ROUNDING  # two products in a row
