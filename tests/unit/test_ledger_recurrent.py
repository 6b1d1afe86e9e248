"""Recurrent layers under the ledger, whose ways forward and back are written out by hand.

Oracles: torch's own layers under plain autograd, for values and all gradients of the batch, and
`ledger_cases.one_at_a_time` for those of each example. Tolerances: `CLOSE` in float64, some hundred
roundings of 1e-16 a moment; `ledger_cases.BOUND`; 1e-5 in float32, whose roundings of 6e-8 differ
between kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.kernels import choice as kernels
from anybatch.ledger.contractions.recurrent_layers import RECURRENT
from ledger_cases import (
    BOUND,
    LSTM_IN_BFLOAT16,
    assert_as_one_at_a_time,
    observe_figures,
    one_at_a_time,
    values,
    worst,
)

CLOSE = 1e-12
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN with relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "time first": {},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True, "batch_first": True},
    "both ways, time first, two layers": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False, "batch_first": True},
}


class Whole(nn.Module):
    """All outputs and ends of a layer as functions of inputs and states, examples first."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *initial: Tensor) -> Tensor:
        states = [state.transpose(0, 1).contiguous() for state in initial]
        hx: Any = None if not states else tuple(states) if len(states) > 1 else states[0]
        is_first = self.layer.batch_first
        outputs, ends = self.layer(x if is_first else x.transpose(0, 1), hx)
        ends = ends if isinstance(ends, tuple) else (ends,)
        turned = outputs if is_first else outputs.transpose(0, 1)
        return torch.cat(
            [x.flatten(1) for x in (turned, *(end.transpose(0, 1) for end in ends))], 1
        )


def whole(kind: str, *, sizes: tuple[int, int] = (4, 3), **options: Any) -> Whole:
    torch.manual_seed(0)
    return Whole(KINDS[kind](*sizes, **options))


def make_states(model: Whole, size: int, **how: Any) -> list[Tensor]:
    """States to begin with, examples first."""
    layer = model.layer
    shape = size, layer.num_layers * (1 + layer.bidirectional), layer.hidden_size
    return [torch.randn(shape, **how) for _ in range(1 + isinstance(layer, nn.LSTM))]


def uneven(x: Tensor) -> Tensor:
    """A number to which no two elements count alike."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)
    return ((x.square() + x) * weights).sum()


def all_of(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Values, and the gradients of inputs and parameters that are there."""
    leaves = [*inputs, *model.parameters()]
    for leaf in leaves:
        leaf.grad = None
    outputs = model(*inputs)
    uneven(outputs).backward()
    return [outputs.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def all_watched(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with ab.observe(model):
        return all_of(model, inputs)


def distance(tensors: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative distance."""
    pairs = zip(tensors, truth, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def inputs_of(model: Whole, size: int = 5, length: int = 6) -> list[Tensor]:
    how: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    width = model.layer.input_size
    return [torch.randn(size, length, width, **how), *make_states(model, size, **how)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_all_gradients_are_those_of_torchs_layer(kind, options):
    model = whole(kind, **OPTIONS[options]).double()
    inputs = inputs_of(model)
    truth = all_of(model, inputs)
    assert len(truth) == 1 + len(inputs) + len(list(model.parameters()))
    assert distance(all_watched(model, inputs), truth) < CLOSE


def classic_gru(x: Tensor, h: Tensor, w_i: Tensor, w_h: Tensor) -> Tensor:
    """Compute the last state of a GRU as Cho et al. do, with r before the product."""
    for x_t in x.unbind(1):
        r, z, n = (x_t @ w_i.T).chunk(3, 1)
        own_r, own_z, own_n = w_h.chunk(3)
        r, z = torch.sigmoid(r + h @ own_r.T), torch.sigmoid(z + h @ own_z.T)
        h = torch.lerp(torch.tanh(n + (r * h) @ own_n.T), h, z)
    return h


def test_the_oracle_tells_apart_the_two_places_of_the_reset_gate():
    model = whole("GRU", batch_first=True, bias=False).double()
    x, h = inputs_of(model)
    with torch.no_grad():
        truth = [model(x, h)[:, -3:]]
        wrong = classic_gru(x, h[:, 0], model.layer.weight_ih_l0, model.layer.weight_hh_l0)
    with ab.observe(model):
        right = model(x, h)[:, -3:].detach()
    assert distance([wrong], truth) > 1e-3
    assert distance([right], truth) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_longer_than_a_batch_has_the_figures_of_each_example_alone(kind):
    model = whole(kind, sizes=(4, 5), batch_first=True).double()
    assert_as_one_at_a_time(model, (torch.randn(3, 20, 4, dtype=torch.float64),))


def squares_of_terms(model: Whole, x: Tensor) -> Tensor:
    """sum_t |g_it|^2 of the recurrent matrix, from a copy of it for each moment of each example."""
    layer, squares = model.layer, []
    for example in x.split(1):
        copies = [layer.weight_hh_l0.detach().clone().requires_grad_() for _ in range(x.shape[1])]
        h = x.new_zeros(1, 3)
        outputs = []
        for x_t, w_h in zip(example.unbind(1), copies, strict=True):
            h = torch.tanh(F.linear(x_t, layer.weight_ih_l0) + F.linear(h, w_h))
            outputs.append(h)
        values(nn.Identity(), (torch.cat([*outputs, h], 1),)).sum().backward()
        squares.append(torch.stack([w.grad.square().sum() for w in copies if w.grad is not None]))
    return torch.stack([each.sum() for each in squares])


def test_the_oracle_tells_the_norm_of_a_sum_over_time_from_the_norms_of_its_terms():
    """Compute the classic mistake with a matrix that is used at every time step."""
    model = whole("RNN", batch_first=True, bias=False).double()
    batch = (torch.randn(4, 6, 4, dtype=torch.float64),)
    truth = one_at_a_time(model, batch)
    squares = truth.squares["layer.weight_hh_l0"]
    assert distance([squares_of_terms(model, *batch)], [squares]) > 0.01
    assert worst(observe_figures(model, batch), truth) < BOUND[torch.float64]


class Part(nn.Module):
    """Some of what a layer gives."""

    def __init__(self, layer: nn.RNNBase, part: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.part = layer, part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.layer(x))


class Unbatched(nn.Module):
    """One layer for each sequence [T, d] by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (h, c) = self.layer(x[0])
        return torch.cat([outputs.flatten(), h.flatten(), c.flatten()])[None]


def test_a_sequence_without_a_batch_is_one_example():
    torch.manual_seed(0)
    assert_as_one_at_a_time(Unbatched().double(), (torch.randn(1, 6, 4, dtype=torch.float64),))


PARTS: dict[str, Callable[[Any], Tensor]] = {
    "outputs": lambda outputs: outputs[0],
    "last output": lambda outputs: outputs[0][:, -1],
    "h": lambda outputs: outputs[1][0][0],
    "c": lambda outputs: outputs[1][1][0],
}


@pytest.mark.parametrize("part", PARTS)
def test_what_reaches_no_loss_is_left_out(part):
    torch.manual_seed(0)
    model = Part(nn.LSTM(4, 3, batch_first=True), PARTS[part]).double()
    inputs = [torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)]
    truth = all_of(model, inputs)
    assert distance(all_watched(model, inputs), truth) < CLOSE


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_layer_has_the_figures_of_each_example_alone(kind, reentrant):
    class Again(Whole):
        def forward(self, x: Tensor, *states: Tensor) -> Tensor:
            h = self.lift(x)
            return checkpoint(super().forward, h, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Again(KINDS[kind](4, 3, 2, batch_first=True)).double()
    model.lift = nn.Linear(4, 4).double()
    assert_as_one_at_a_time(model, (torch.randn(4, 6, 4, dtype=torch.float64),))


@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_between_layers_draws_as_torchs_does(batch_first):
    model = whole("LSTM", num_layers=3, dropout=0.5, batch_first=batch_first).double()
    inputs = inputs_of(model)
    torch.manual_seed(1)
    truth = all_of(model, inputs)
    with ab.observe(model):
        model(*inputs)  # finds the plan, which draws
    with ab.observe(model):
        torch.manual_seed(1)
        tensors = all_of(model, inputs)
    assert distance(tensors, truth) < CLOSE
    torch.manual_seed(2)
    assert distance(all_of(model, inputs), truth) > 0.01  # draws matter


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_changed_in_place(kind):
    torch.manual_seed(0)
    model = Part(KINDS[kind](4, 3, batch_first=True), lambda outputs: outputs[0].sin_()).double()
    inputs = [torch.randn(5, 6, 4, dtype=torch.float64, requires_grad=True)]
    truth = all_of(model, inputs)
    assert distance(all_watched(model, inputs), truth) < CLOSE


def make_arguments(kind: str, *sizes: int) -> tuple[nn.RNNBase, Tensor, Any]:
    """Make the arguments of torch's function: a layer, time-first inputs, states."""
    torch.manual_seed(0)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)(*sizes)
    h = torch.zeros(1, 5, sizes[1])
    x = torch.randn(6, 5, sizes[0], requires_grad=True)
    return layer, x, (h, h) if kind == "lstm" else h


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(kind):
    layer, x, hx = make_arguments(kind, 4, 3)
    run = RECURRENT[getattr(torch, kind)]
    outputs = run(x, hx, layer._flat_weights, True, 1, 0.0, True, False, False)[0]
    gradients = [torch.autograd.grad(uneven(outputs), x, retain_graph=True)[0] for _ in range(2)]
    (last,) = torch.autograd.grad(uneven(outputs), x)
    assert all(torch.equal(last, other) for other in gradients)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(uneven(outputs), x)


def test_a_second_derivative_is_refused():
    layer, x, hx = make_arguments("lstm", 4, 3)
    run = RECURRENT[torch.lstm]
    outputs = run(x, hx, layer._flat_weights, True, 1, 0.0, True, False, False)[0]
    with pytest.raises(LedgerError, match="The loss differentiates a gradient"):
        torch.autograd.grad(uneven(outputs), x, create_graph=True)


def test_a_matrix_that_is_data_gets_its_gradient():
    """Biases are parameters, the recurrent matrix is an input that has a gradient of its own."""

    class LastLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3)

        def forward(self, x: Tensor, w_h: Tensor) -> Tensor:
            w_i, _, *biases = self.layer._flat_weights
            h = x.new_zeros(1, len(x), 3)
            weights = [w_i, w_h, *biases]
            outputs = torch.lstm(x, (h, h), weights, True, 1, 0.0, True, False, True)
            return outputs[0]

    torch.manual_seed(0)
    model = LastLayer().double()
    model.layer.weight_hh_l0.requires_grad_(False)
    how: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    inputs = [torch.randn(5, 6, 4, **how), torch.randn(12, 3, **how)]
    all_watched(model, inputs)  # finds the plan, by ways back that reach the matrix too
    truth = all_of(model, inputs)
    assert distance(all_watched(model, inputs), truth) < CLOSE


@pytest.mark.parametrize(
    "kind", [pytest.param("lstm", marks=LSTM_IN_BFLOAT16), "gru", "rnn_tanh", "rnn_relu"]
)
def test_autocast_rounds_as_torchs_layer_does(kind):
    """Allow 8 bits in each product and each gate, half a per cent of the whole."""
    run, (layer, x, hx) = RECURRENT[getattr(torch, kind)], make_arguments(kind, 16, 16)
    others = (layer._flat_weights, True, 1, 0.0, True, False, False)
    with torch.no_grad():
        exact = getattr(torch, kind)(x, hx, *others)[0]
        with torch.autocast("cpu", torch.bfloat16):
            truth, output = (way(x, hx, *others)[0] for way in (getattr(torch, kind), run))
    assert distance([output.float()], [exact]) < 2 * distance([truth.float()], [exact])
    assert distance([output.float()], [exact]) > 1e-4  # it is not float32 in disguise


@pytest.mark.parametrize("kind", KINDS)
def test_backward_passes_under_autocast_changes_nothing(kind):
    model = whole(kind, sizes=(16, 16), batch_first=True)
    x = torch.randn(8, 10, 16)
    model(x)
    with ab.observe(model):
        uneven(model(x)).backward()
        plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        total = uneven(model(x))
        with torch.autocast("cpu", torch.bfloat16):
            total.backward()
    assert all(
        torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), plain, strict=True)
    )


@pytest.mark.fast(2)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_matrices_give_the_same(kind, batch_first):
    model = whole(kind, sizes=(64, 256), batch_first=batch_first)
    x = torch.randn(32, 20, 64, requires_grad=True)
    truth = all_of(model.double(), [x.detach().double().requires_grad_()])
    model.float()
    torchs = all_watched(model, [x])
    kernels.use("onednn")
    try:
        packed = all_watched(model, [x])
    finally:
        kernels.use("torch")
    assert distance([one.double() for one in packed], truth) < 1e-5
    assert not all(map(torch.equal, packed, torchs))  # it is another kernel
