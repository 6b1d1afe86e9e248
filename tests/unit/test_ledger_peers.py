"""Cases that other tools get wrong silently, or refuse, each with the formula that goes wrong.

Silent in peers: circular padding, `padding_idx`, a head that is the embedding, positions shared by
the batch, grouped convolutions, a module used twice. Refused by peers: keyword inputs,
`nn.MultiheadAttention`, `nn.LSTM`, in-place ReLU, `LayerNorm(bias=False)`, 4-D Linear, a bare
parameter.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone; tolerance:
`ledger_cases.BOUND`. The control of each silent error is the wrong formula, at least 1 % away.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ledger_cases import (
    BOUND,
    assert_as_one_at_a_time,
    observe_figures,
    one_at_a_time,
    values,
    worst,
)

WRONG = 1e-2


def square_norms(model: nn.Module, *batch: Tensor) -> dict[str, Tensor]:
    """|g_i|^2 by parameter, found by the ledger and confirmed by the oracle."""
    truth = one_at_a_time(model, batch)
    figures = observe_figures(model, batch)
    assert worst(figures, truth) < BOUND[torch.float64]
    return figures.squares


def distance(wrong: Tensor, right: Tensor) -> float:
    return float((wrong - right).norm() / right.norm())


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gradients_at(outputs: Tensor) -> Tensor:
    """d_i = dv_i / doutputs, `ledger_cases.values` being sum w (y^2 + y) over an example's y."""
    flat = outputs.detach().flatten(1)
    weights = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return (weights * (2 * flat + 1)).view_as(outputs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_by_what_is_there(mode):
    layer = nn.Conv1d(2, 3, 3, padding=1, padding_mode=mode).double()
    x = normal(4, 2, 6)
    right = square_norms(layer, x)["weight"]
    d = gradients_at(layer(x))
    wrong = [
        F.conv1d(F.pad(xi, (1, 1))[:, None], di[:, None]).square().sum()  # padded by 0
        for xi, di in zip(x, d, strict=True)
    ]
    assert distance(torch.stack(wrong), right) > WRONG


def test_rows_of_padding_have_no_gradient():
    layer, ids = nn.Embedding(5, 3, padding_idx=0).double(), torch.randint(5, (6, 4))
    with torch.no_grad():
        layer.weight[0] = 0.5
    right = square_norms(layer, ids)["weight"]
    rows = F.one_hot(ids, 5).double().mT @ gradients_at(layer(ids))  # the padding's too
    assert distance(rows.square().sum((1, 2)), right) > WRONG


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.embedding(ids)), self.embedding.weight)


def test_an_embedding_that_is_the_head_too():
    model, ids = Tied().double(), torch.randint(7, (5, 4))
    right = square_norms(model, ids)["embedding.weight"]
    weight = model.embedding.weight
    head, table = (weight.detach().clone().requires_grad_() for _ in range(2))
    v = values(lambda i: F.linear(torch.tanh(F.embedding(i, table)), head), (ids,))
    pairs = [torch.autograd.grad(one, (head, table), retain_graph=True) for one in v]
    apart = torch.stack([h.square().sum() + t.square().sum() for h, t in pairs])
    assert distance(apart, right) > WRONG  # |a|^2 + |b|^2 is not |a + b|^2
    hooked = torch.stack([t.square().sum() for _, t in pairs])  # the use by a function not seen
    assert distance(hooked, right) > WRONG


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.bare = nn.Embedding(9, 3), nn.Parameter(torch.randn(1, 9, 3))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        return torch.tanh(x + self.table(steps)) * (1 + self.bare[:, : x.shape[1]])


@pytest.mark.parametrize("length", [3, 5])  # 5 of 5: rows of positions look like examples
def test_positions_that_the_batch_shares(length):
    model, x = Positions().double(), normal(5, length, 3)
    right = square_norms(model, x)["table.weight"]
    whole = torch.autograd.grad(values(model, (x,)).sum(), model.table.weight)[0]
    rows = whole.square().sum(1)  # the batch's gradient of row t, taken for that of example t
    assert distance(rows[: len(x)], right) > WRONG


@pytest.mark.parametrize("groups", [2, 4])
def test_convolutions_in_groups(groups):
    layer, x = nn.Conv2d(4, 4, 3, groups=groups).double(), normal(3, 4, 6, 6)
    right = square_norms(layer, x)["weight"]
    d = gradients_at(layer(x))
    patches = F.unfold(x, 3)
    wrong = (d.flatten(2) @ patches.mT).square().sum((1, 2))  # every pair of channels
    assert distance(wrong, right) > WRONG


def test_a_module_used_twice():
    layer = nn.Linear(3, 3).double()
    model, x = nn.Sequential(layer, nn.Tanh(), layer), normal(5, 3)
    right = square_norms(model, x)["0.weight"]
    first, second = (layer.weight.detach().clone().requires_grad_() for _ in range(2))
    v = values(lambda i: F.linear(F.linear(i, first, layer.bias).tanh(), second, layer.bias), (x,))
    pairs = [torch.autograd.grad(one, (first, second), retain_graph=True) for one in v]
    apart = torch.stack([a.square().sum() + b.square().sum() for a, b in pairs])
    assert distance(apart, right) > WRONG
    last = torch.stack([b.square().sum() for _, b in pairs])  # a hook that keeps what came last
    assert distance(last, right) > WRONG


def test_tokens_of_one_example_are_added_before_they_are_squared():
    layer, x = nn.Linear(3, 2).double(), normal(4, 6, 3)
    right = square_norms(layer, x)["weight"]
    d = gradients_at(layer(x))
    wrong = (x.square().sum(2) * d.square().sum(2)).sum(1)
    assert distance(wrong, right) > WRONG


class Loud(nn.Module):
    """All that others refuse, in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))  # bare
        self.norm = nn.LayerNorm(4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.first, self.relu, self.last = nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        h = self.norm(input=x) * self.scale
        h = h + self.attention(query=h, key=h, value=h, attn_mask=mask)[0]
        h = self.lstm(input=h)[0].unflatten(1, (2, -1))  # 4-D
        return self.last(input=self.relu(self.first(input=h)))


def test_what_others_refuse_works():
    def tell(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        (x,) = batch
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return values(lambda inputs: model(x=inputs, mask=mask), (x,))

    assert_as_one_at_a_time(Loud().double(), (normal(5, 6, 4),), tell)
