"""Whole modules, and the ways in which models use their parameters.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone. Tolerance:
`ledger_cases.BOUND`; under autocast to bfloat16, whose numbers have 8 bits, 5 %: a rounding of
0.4 % in each of some ten operations, twice as much for squares.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ledger_cases import (
    BOUND,
    LSTM_IN_BFLOAT16,
    assert_as_one_at_a_time,
    observe_figures,
    one_at_a_time,
    trainable,
    worst,
)
from properties import seeded_examples


class Call(nn.Module):
    """Modules, and a function of them and of the inputs."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def batch_first(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Module with time first, for inputs and outputs that have examples first."""

    def transpose_output(model: nn.Module, *inputs: Tensor) -> Any:
        return forward(model, *(x.transpose(0, 1) for x in inputs)).transpose(0, 1)

    return transpose_output


def attention(**options: Any) -> nn.Module:
    return Call(
        lambda m, x: m.a(x, x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(4, 2, batch_first=True, **options),
    )


def masked_attention(model: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    outputs, weights = model.a(x, key=x.tanh(), value=x, attn_mask=mask, average_attn_weights=False)
    return torch.cat([outputs.flatten(1), weights.flatten(1)], 1)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    layer = kind(4, 3, **options)
    if layer.batch_first:
        return Call(lambda m, x: m.r(x)[0], r=layer)
    return Call(batch_first(lambda m, x: m.r(x)[0]), r=layer)


def last_states(model: nn.Module, x: Tensor) -> Tensor:
    initial = model.h.expand(1, len(x), 3).contiguous()
    _, (h, c) = model.r(x, (initial, initial.tanh()))
    return torch.cat([h[0], c[0]], 1)


def cells(model: nn.Module, x: Tensor) -> Tensor:
    h = c = g = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h, c = model.lstm(x[:, t], (h, c))
        g = model.gru(h, model.rnn(c, g))
    return torch.cat([h, g], 1)


class LowRank(nn.Module):
    """W + B A, both trained; as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.b @ self.a


def low_rank() -> nn.Module:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def frozen() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Tanh())
    layers[0].weight.requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    layers[2].requires_grad_(False)
    return layers


def vision(model: nn.Module, x: Tensor) -> Tensor:
    """A class token, positions by a bare parameter and by look-up, as in ViT and GPT."""
    x = torch.cat([model.token.expand(len(x), -1, -1), x], 1)
    x = x + model.where(torch.arange(x.shape[1])) + model.positions[:, : x.shape[1]]
    return model.head(x)


def relative(model: nn.Module, x: Tensor) -> Tensor:
    """A bias of attention looked up by distance, as in T5 and Swin."""
    steps = torch.arange(x.shape[1])
    bias = model.table(steps[:, None] - steps + 8).permute(2, 0, 1)
    q = x[:, None].expand(-1, 2, -1, -1)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias[None])


SHARED = nn.Linear(4, 4)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": attention,
    "attention, no bias, other widths": lambda: attention(bias=False, add_bias_kv=True),
    "attention with a mask and weights": lambda: Call(
        masked_attention, a=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "attention, time first": lambda: Call(
        batch_first(lambda m, x: m.a(x, x, x)[0]), a=nn.MultiheadAttention(4, 2)
    ),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0, batch_first=True),
    "encoder, time first": lambda: Call(
        batch_first(lambda m, x: m.e(x)),
        e=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
    ),
    "decoder layer": lambda: Call(
        lambda m, x: m.d(x, x.flip(1)),
        d=nn.TransformerDecoderLayer(4, 2, 6, dropout=0, batch_first=True),
    ),
    "decoder layer, time first": lambda: Call(
        batch_first(lambda m, x: m.d(x, x.flip(0))),
        d=nn.TransformerDecoderLayer(4, 2, 6, dropout=0),
    ),
    **{
        f"{kind.__name__}, {name}": lambda kind=kind, options=options: recurrent(kind, **options)
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for name, options in {
            "batch first": {"batch_first": True},
            "time first": {},
            "two layers, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
            "no bias": {"bias": False, "bidirectional": True},
        }.items()
    },
    "RNN with relu": lambda: recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM with a projection": lambda: recurrent(nn.LSTM, proj_size=2, num_layers=2),
    "LSTM, states that begin as a parameter": lambda: Call(
        last_states, r=nn.LSTM(4, 3, batch_first=True), h=nn.Parameter(torch.randn(1, 1, 3))
    ),
    "cells": lambda: Call(
        cells, lstm=nn.LSTMCell(4, 3), gru=nn.GRUCell(3, 3, bias=False), rnn=nn.RNNCell(3, 3)
    ),
    "used several times": lambda: nn.Sequential(SHARED, nn.Tanh(), SHARED, nn.Tanh(), SHARED),
    "used several times, of several lengths": lambda: Call(
        lambda m, x: torch.cat([m.l(x).tanh().flatten(1), m.l(x[:, :1]).flatten(1)], 1), l=SHARED
    ),
    "weights tied by a name": lambda: Call(
        lambda m, x: m.b(m.a(x).tanh()), a=SHARED, b=Call(lambda m, x: x @ m.w, w=SHARED.weight)
    ),
    "keyword inputs": lambda: Call(
        lambda m, x: F.linear(bias=m.l.bias, weight=m.l.weight, input=m.n(input=x)),
        l=nn.Linear(4, 3),
        n=nn.LayerNorm(4),
    ),
    "activations in place": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True)
    ),
    "frozen parameters": frozen,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "low rank": low_rank,
    "low rank beside": lambda: Call(
        lambda m, x: m.w(x) + m.b(m.a(x)),
        w=nn.Linear(4, 3).requires_grad_(False),
        a=nn.Linear(4, 2, bias=False),
        b=nn.Linear(2, 3, bias=False),
    ),
    "a penalty on a parameter": lambda: Call(
        lambda m, x: m.l(x) + m.l.weight.square().sum(), l=nn.Linear(4, 3)
    ),
    "positions": lambda: Call(
        vision,
        token=nn.Parameter(torch.randn(1, 1, 4)),
        positions=nn.Parameter(torch.randn(1, 9, 4)),
        where=nn.Embedding(9, 4),
        head=nn.Linear(4, 3),
    ),
    "a bias looked up by distance": lambda: Call(relative, table=nn.Embedding(17, 2)),
    "parameters without a use": lambda: Call(
        lambda m, x: m.l(x), l=nn.Linear(4, 3), idle=nn.Linear(2, 2)
    ),
}


@pytest.mark.fast(10)
@pytest.mark.parametrize("name", MODULES)
@seeded_examples(2)
@given(size=st.integers(1, 7), length=st.integers(1, 7), seed=st.integers(0, 99))
@example(size=6, length=6, seed=0)  # a sequence as long as the batch
@example(size=1, length=3, seed=1)
def test_a_module_has_the_figures_of_each_example_alone(name, size, length, seed):
    torch.manual_seed(seed)
    model = MODULES[name]().double()
    assert_as_one_at_a_time(model, (torch.randn(size, length, 4, dtype=torch.float64),))


class Checkpointed(nn.Module):
    """Blocks that run again in the backward pass, one of them inside another, one used twice."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4))
        self.inner = nn.GRU(4, 4, batch_first=True)
        self.low = parametrizations.weight_norm(nn.Linear(4, 3))
        self.reentrant = reentrant

    def again(self, function: Callable[..., Any], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def nested(self, x: Tensor) -> Tensor:
        return x + self.again(lambda h: self.inner(h)[0], self.again(self.block, x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.block, self.first(x))
        x = self.again(self.nested, x)
        return self.last(x).sin() + self.again(self.low, x)


@pytest.mark.filterwarnings("ignore:None of the inputs")  # of torch, where one is in another
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_checkpointed_layers_have_their_figures_whatever_the_kind(reentrant, size):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant).double()
    batch = (torch.randn(size, 6, 4, dtype=torch.float64),)
    truth = one_at_a_time(model, batch)
    assert all(bool((squares > 0).all()) for squares in truth.squares.values())  # every layer
    assert worst(observe_figures(model, batch), truth) < BOUND[torch.float64]


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "encoder layer",
        pytest.param("LSTM, batch first", marks=LSTM_IN_BFLOAT16),
        "positions",
        "low rank",
        "activations in place",
        "a bias looked up by distance",
    ],
)
def test_under_autocast_the_figures_are_those_of_each_example_alone(name):
    torch.manual_seed(0)
    model = MODULES[name]()
    batch = (torch.randn(4, 6, 4),)
    with torch.autocast("cpu", torch.bfloat16):
        truth = one_at_a_time(model, batch)
    exact = one_at_a_time(model, batch)
    figures = observe_figures(model, batch, precision="bfloat16")
    assert worst(figures, truth) < 0.05
    assert worst(figures, exact) > 1e-4  # it is not float32 in disguise
    assert trainable(model).keys() == figures.squares.keys()


@pytest.mark.parametrize("first", [(6, 3), (1, 4)])
def test_a_plan_holds_for_batches_of_other_shapes(first):
    """A sequence as long as the batch, after one whose shapes left no doubt, or said nothing."""
    torch.manual_seed(0)
    model = MODULES["encoder, time first"]().double()
    for size, length in (first, (7, 7), (3, 5), (1, 4)):
        assert_as_one_at_a_time(model, (torch.randn(size, length, 4, dtype=torch.float64),))


def test_a_branch_that_begins_at_zero_is_placed_for_later():
    """Time first and a gate of 0, so that no gradient enters the branch at the first step."""
    torch.manual_seed(0)
    model = Call(
        lambda m, x: x + m.gate * m.a(x.mT.mT, x, x)[0],
        gate=nn.Parameter(torch.zeros(1)),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
    ).double()
    batch = (torch.randn(6, 3, 4, dtype=torch.float64),)
    assert_as_one_at_a_time(model, batch)
    with torch.no_grad():
        model.gate.fill_(0.5)
    assert_as_one_at_a_time(model, batch)


def test_layers_unfrozen_later_are_seen_from_then_on():
    torch.manual_seed(0)
    model = frozen().double()
    batch = (torch.randn(6, 3, 4, dtype=torch.float64),)
    assert_as_one_at_a_time(model, batch)
    model.requires_grad_(True)
    assert_as_one_at_a_time(model, batch)
