"""Rows that a model moves by what they hold: routed, packed, sorted, chosen, looked up.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone; where the model draws,
plain autograd of each loss on the graph of the whole batch, drawn from the same seed. Tolerance:
`ledger_cases.BOUND` in float64. The control is in `test_ledger_foreign_models`: another owner for
each row is off by more than 1e-2.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.placement import Placement, group_rows
from anybatch.ledger.ledger import Observe
from anybatch.ledger.row_owners import DoubtError, Owners, Scales, iterate_masks
from anybatch.ledger.watched_pass import WatchedPass
from ledger_cases import BOUND, assert_as_one_at_a_time, trainable, values

SIZES = (7, 4, 2, 1)  # the last one needs no owners


class Call(nn.Module):
    """Modules and parameters, and a function of them and of the inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def route(model: nn.Module, x: Tensor) -> Tensor:
    """Each token to one of three experts of different make, as in a Switch Transformer."""
    h = model.a(x).flatten(0, 1)
    gate = model.gate(h).softmax(-1)
    best, out = gate.argmax(-1), torch.zeros_like(h)
    for k, expert in enumerate((model.linear, model.mlp, model.norm)):
        rows = (best == k).nonzero()[:, 0]
        out.index_add_(0, rows, expert(h[rows]) * gate[rows, k, None])
    return out.view(*x.shape[:2], -1)


def masked(model: nn.Module, x: Tensor) -> Tensor:
    """Two experts whose scales, matrices and biases are parameters of their own."""
    h = model.a(x)
    is_first, out = model.gate(h)[..., 0] > 0, torch.empty_like(h)
    for k, mask in enumerate((is_first, ~is_first)):
        out[mask] = model.scale[k] * torch.tanh(h[mask] @ model.matrix[k]) + model.shift[k]
    return out


def without_padding(model: nn.Module, x: Tensor) -> Tensor:
    """Tokens of all examples in one row, as for kernels of variable length."""
    ids = (3 * x[..., 0]).long().abs() % 7
    keep = ids > 1
    keep[:, 0] = True
    out = torch.zeros(*ids.shape, 5, dtype=x.dtype)
    out[keep] = model.norm(model.embedding(ids[keep])) * model.scale
    return model.head(out.sum(1))


def sorted_in_python(model: nn.Module, x: Tensor) -> Tensor:
    h, order = model.a(x), x[:, 0, 0].argsort().tolist()
    y = model.b(torch.stack([h[i] for i in order]).tanh())
    return torch.stack([y[order.index(i)] for i in range(len(order))])


def gathered(model: nn.Module, x: Tensor) -> Tensor:
    index = x[:, :1, :1].argsort(0).expand_as(x)
    return torch.zeros_like(x).scatter(0, index, model.b(model.a(x).gather(0, index)).tanh())


def through_images(model: nn.Module, x: Tensor) -> Tensor:
    is_first = x[:, 0, 0] > 0
    out = x.new_zeros(len(x), 3, 3)
    out[is_first], out[~is_first] = model.first(x[is_first]), model.second(x[~is_first])
    return out


def look_up(model: nn.Module, x: Tensor) -> Tensor:
    """Rows of parameters, by an index from the data, negative ones among them."""
    which = (x[..., 0] > 0).long() - 1
    y = model.a(x) * model.scale[which][..., None] + model.shift[which]
    return y + model.shift.index_select(0, which[:, 0].abs())[:, None]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "experts": lambda: Call(
        route,
        a=nn.Linear(4, 5),
        gate=nn.Linear(5, 3),
        linear=nn.Linear(5, 5),
        mlp=nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)),
        norm=nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5, bias=False)),
    ),
    "experts of bare parameters": lambda: Call(
        masked,
        a=nn.Linear(4, 5),
        gate=nn.Linear(5, 1),
        scale=torch.randn(2, 5),
        matrix=torch.randn(2, 5, 5),
        shift=torch.randn(2, 5),
    ),
    "no padding": lambda: Call(
        without_padding,
        embedding=nn.Embedding(7, 5),
        norm=nn.LayerNorm(5),
        scale=torch.randn(5),
        head=nn.Linear(5, 3),
    ),
    "sorted in Python": lambda: Call(sorted_in_python, a=nn.Linear(4, 5), b=nn.Linear(5, 3)),
    "gathered": lambda: Call(gathered, a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
    "images": lambda: Call(
        through_images,
        first=nn.Conv1d(3, 3, 2),
        second=nn.Sequential(nn.Conv1d(3, 3, 2), nn.GroupNorm(3, 3), nn.PReLU(3)),
    ),
    "looked up": lambda: Call(
        look_up, a=nn.Linear(4, 5), scale=torch.randn(2), shift=torch.randn(2, 5)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_followed_to_the_examples_that_they_come_from(name, caplog):
    model = MODELS[name]().double()
    for size in SIZES:
        assert_as_one_at_a_time(model, (normal(size, 3, 4),))
    assert caplog.messages == []  # none went through its examples one after the other


def test_rows_that_are_routed_elsewhere_at_each_step_are_followed():
    model = MODELS["experts"]().double()
    for _ in range(12):  # the 10th is one at which the plan is made anew
        assert_as_one_at_a_time(model, (normal(6, 3, 4),))


class Packed(nn.Module):
    """A recurrent layer over sequences of several lengths, and its final states."""

    def __init__(self, layer: nn.RNNBase, *, is_sorted: bool) -> None:
        super().__init__()
        self.layer, self.is_sorted = layer, is_sorted
        self.inner, self.head = nn.Linear(4, 4), nn.LazyLinear(3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        x = self.inner(x)
        x = x if self.layer.batch_first else x.transpose(0, 1)
        is_first = self.layer.batch_first
        sequence = pack_padded_sequence(x, lengths, is_first, enforce_sorted=self.is_sorted)
        output, states = self.layer(sequence)
        padded, _ = pad_packed_sequence(output, is_first, total_length=6)
        states = states if isinstance(states, tuple) else (states,)
        padded = padded if is_first else padded.transpose(0, 1)
        return self.head(padded) * _mask(lengths), *(s.transpose(0, 1) for s in states)


def _mask(lengths: Tensor) -> Tensor:
    return (torch.arange(6) < lengths[:, None])[:, :, None]


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "LSTM": lambda: nn.LSTM(4, 5, batch_first=True),
    "LSTM, projected, both ways": lambda: nn.LSTM(4, 5, proj_size=2, bidirectional=True),
    "GRU, two layers, both ways": lambda: nn.GRU(4, 5, 2, bidirectional=True, batch_first=True),
    "RNN": lambda: nn.RNN(4, 5, nonlinearity="relu"),
    "RNN without biases": lambda: nn.RNN(4, 5, bias=False, batch_first=True),
}


def sequences(size: int, *, is_sorted: bool) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, 7, (size,))
    return normal(size, 6, 4), lengths.sort(descending=True).values if is_sorted else lengths


@pytest.mark.fast(3)
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_have_the_figures_of_each_example_alone(name, is_sorted, caplog):
    model = Packed(LAYERS[name](), is_sorted=is_sorted).double()
    model(*sequences(2, is_sorted=True))  # the head gets its size
    for size in SIZES:
        assert_as_one_at_a_time(model, sequences(size, is_sorted=is_sorted))
    assert caplog.messages == []


def test_packed_sequences_draw_what_torch_draws_between_layers():
    layer = nn.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=True)
    model, batch = Packed(layer, is_sorted=False).double(), sequences(5, is_sorted=False)
    model(*batch)
    key, parameters = ab.Key(0, 0), trainable(model)
    objective = ab.Objective(values)
    gradient = ab.batch_gradient(
        model, objective, batch, key=key, observe=Observe(gradients=True, norms=False)
    )
    torch.manual_seed(key.grain(0))
    v = values(model, batch)
    assert gradient.ledger is not None
    assert gradient.ledger.gradients is not None
    for i in range(5):
        plain = torch.autograd.grad(v[i], list(parameters.values()), retain_graph=True)
        for name, g in zip(parameters, plain, strict=True):
            gradient_of_one = gradient.ledger.gradients[name][i]
            assert (gradient_of_one - g).norm() <= BOUND[torch.float64] * g.norm()


def test_owners_are_read_off_the_halves_and_mixed_rows_are_found():
    truth = torch.tensor([4, 0, 2, 2, 1, -1])  # by hand; the last row belongs to nobody

    def look(mixed_row: int | None) -> tuple[bool, Tensor | None]:
        owners, is_right = Owners(5), True
        for half in iterate_masks(5, torch.device("cpu")):
            owners.begin_pass()
            rows = torch.tensor([[float(i >= 0 and half[i])] for i in truth.tolist()])
            if mixed_row is not None:
                rows[mixed_row] += float(half[3])  # example 3 too
            is_right &= owners.add_gradient(rows)
        return is_right, owners.pop_owners((truth >= 0).double()[:, None])

    is_right, owners = look(None)
    assert is_right
    assert torch.equal(owners, truth)
    assert look(mixed_row=2)[0] is False  # the control


def find_owners(rows: Tensor, num_examples: int) -> Tensor | None:
    """Find the owners of rows, given [N, B], the part of each row's gradient from each example."""
    scales = Scales(num_examples, torch.device("cpu"))
    for factors in scales.iterate_factors():
        scales.add_gradient((rows * factors).sum(1, keepdim=True))
    return scales.find_owners(Placement("rows", 1), rows.sum(1, keepdim=True)).owners


@pytest.mark.parametrize("num_examples", [2, 16, 17, 300])
def test_powers_of_two_tell_owners_and_mixed_rows_are_in_doubt(num_examples):
    owners = torch.arange(num_examples).flip(0)
    rows = normal(num_examples, num_examples) * torch.eye(num_examples).flip(0)
    rows[0] = 0
    assert torch.equal(
        find_owners(rows, num_examples), torch.where(owners == owners[0], -1, owners)
    )
    for share in (1.0, 1e-6):  # of a second example, the control
        rows[1, -1] = share
        with pytest.raises(DoubtError, match="mixed"):
            find_owners(rows, num_examples)


@pytest.mark.parametrize("name", ["experts", "no padding"])
def test_the_short_way_is_taken_for_many_examples(name, monkeypatch):
    model = MODELS[name]().double()
    assert_as_one_at_a_time(model, (normal(40, 3, 4),))
    monkeypatch.setattr(WatchedPass, "_confirm", lambda *_: pytest.fail("the long way"))
    assert_as_one_at_a_time(model, (normal(40, 3, 4),))


def test_rows_that_mix_examples_only_later_are_refused_then():
    model = MODELS["experts"]().double()
    inner, model.weight_of_others = model.function, 0.0

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = inner(module, x)
        return y + module.weight_of_others * y.mean(0)

    model.function = forward
    assert_as_one_at_a_time(model, (normal(6, 3, 4),))
    model.weight_of_others = 1e-3
    with pytest.raises(LedgerError, match="couple"):
        ab.batch_gradient(model, ab.Objective(values), (normal(6, 3, 4),), observe=Observe())


def test_rows_are_laid_out_by_example_in_their_order():
    rows, owners = torch.arange(1.0, 6.0)[:, None], torch.tensor([2, 0, -1, 2, 0])
    groups = group_rows(rows, owners, 3)
    assert groups[..., 0].tolist() == [[2, 5], [0, 0], [1, 4]]
