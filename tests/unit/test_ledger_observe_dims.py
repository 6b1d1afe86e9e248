"""`ab.observe` where examples are not the first dimension of the first argument.

Oracle: `observed_loops.one_at_a_time`, plain autograd of each example alone, within its bound. The
control is the norms of the rows of the other dimension.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from observed_loops import assert_exact, distance, normal, one_at_a_time

SIZES = [(7, 5), (5, 5), (4, 8), (12, 12)]  # time steps and examples


def recurrent() -> nn.Module:
    return nn.LSTM(4, 3)


def attending() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the losses [B] of sequences [T, B, 4]."""
    outputs = model(x)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    return outputs.square().sum((0, 2)) / x.shape[1]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [recurrent, attending, linear])
def test_sequences_with_time_first(make, sizes):
    torch.manual_seed(0)
    model, x = make().double(), normal(*sizes, 4)
    truth = one_at_a_time(model, losses(model, x))
    for dim in (1, -2):
        model.zero_grad()
        with ab.observe(model, examples=sizes[1], dim=dim) as ledger:
            losses(model, x).sum().backward()
        assert_exact(ledger, model, truth)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [recurrent, attending, linear])
def test_without_a_word_said_they_are_refused_with_the_way_to_say_it(make, sizes):
    torch.manual_seed(0)
    model, x = make().double(), normal(*sizes, 4)
    with ab.observe(model), pytest.raises(LedgerError, match=r"ab\.observe\(model, dim=1\)"):
        losses(model, x).sum().backward()


@pytest.mark.parametrize("sizes", [(7, 5), (5, 5)])
def test_word_ids_with_time_first(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
    ids = torch.arange(sizes[0] * sizes[1]).view(sizes) % 9

    def losses() -> Tensor:
        return F.cross_entropy(model(ids).transpose(1, 2), ids, reduction="none").mean(0)

    truth = one_at_a_time(model, losses())
    with ab.observe(model), pytest.raises(LedgerError, match=r"ab\.observe\(model, dim=1\)"):
        losses().sum().backward()
    with ab.observe(model, dim=1) as ledger:
        losses().sum().backward()
    assert_exact(ledger, model, truth)


def test_a_word_that_the_first_dimension_is_meant_is_taken():
    model, x = linear().double(), normal(7, 5, 4)
    rows = model(x).square().sum((1, 2))
    truth = one_at_a_time(model, rows)
    with ab.observe(model, dim=0) as ledger:
        model(x).square().sum((0, 2)).sum().backward()
    assert_exact(ledger, model, truth)
    others = one_at_a_time(model, model(x).square().sum((0, 2)))
    assert distance(others.norm(dim=1), truth.norm(dim=1)[:5]) > 0.1  # the control


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.relu(1 - z.std(0)).mean(),
        lambda z: z.mean(0).sum(),
        lambda z: z.square().mean((1, 2)).mean(),
        lambda z: z.square().mean(),
    ],
)
def test_losses_over_examples_along_the_first_dimension_are_not_mistaken(loss):
    model, x = linear().double(), normal(6, 5, 4)
    with ab.observe(model) as ledger:
        loss(model(x)).backward()
    assert ledger.norms.shape == (6,)


class Masked(nn.Module):
    """Attention [B, T, 4] under a mask [T, T], given before or after the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.queries, self.output = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.queries(x) @ self.keys(x).transpose(1, 2)
        return self.output(scores.masked_fill(~mask, -1e9).softmax(-1) @ x)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5), (3, 3), (6, 4), (4, 8), (12, 12)])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_mask_for_all_examples_as_long_as_the_batch(sizes, is_wrapped):
    torch.manual_seed(0)
    model, x = Masked().double(), normal(*sizes, 4)
    mask = torch.ones(sizes[1], sizes[1]).tril().bool()
    truth = one_at_a_time(model, model(x, mask).square().sum((1, 2)))
    with ab.observe(model) as ledger:
        model(x, ab.Shared(mask) if is_wrapped else mask).square().sum().backward()
    assert_exact(ledger, model, truth)


class OnGraphs(nn.Module):
    """Nodes [B, N, 4] of one graph, whose matrix is the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, neighbours: Tensor, x: Tensor) -> Tensor:
        return self.second(neighbours @ self.first(x).tanh()).sum(-2)


@pytest.mark.parametrize("sizes", [(6, 5), (5, 5), (10, 5), (5, 10)])
def test_a_matrix_for_all_examples_before_them(sizes):
    torch.manual_seed(0)
    model, x = OnGraphs().double(), normal(*sizes, 4)
    neighbours = normal(sizes[1], sizes[1], seed=1)
    truth = one_at_a_time(model, model(neighbours, x).square().sum(1))
    with ab.observe(model) as ledger:
        model(ab.Shared(neighbours), x).square().sum().backward()
    assert_exact(ledger, model, truth)
    model.zero_grad()
    with ab.observe(model, examples=sizes[0], dim=0) as ledger:
        model(neighbours, x).square().sum().backward()
    assert_exact(ledger, model, truth)
    if sizes[0] != sizes[1]:
        other = copy.deepcopy(model)  # not known yet
        with ab.observe(other), pytest.raises(LedgerError, match=r"ab\.observe\(model"):
            other(neighbours, x).square().sum().backward()


def test_a_part_without_examples_that_is_called_first_needs_their_number():
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

        def losses(self, x: Tensor) -> Tensor:
            places = self.places(torch.arange(x.shape[1]))
            return self.layer(x + places).square().sum((1, 2))

    torch.manual_seed(0)
    model, x = Placed().double(), normal(6, 5, 4)
    truth = one_at_a_time(model, model.losses(x))
    with ab.observe(model, examples=6) as ledger:
        model.losses(x).sum().backward()
    assert_exact(ledger, model, truth)
    other = copy.deepcopy(model)  # not known yet
    with ab.observe(other), pytest.raises(LedgerError, match="examples=B"):
        other.losses(x).sum().backward()


def test_a_head_that_takes_all_rows_of_all_examples():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(4, 5), "head": nn.Linear(5, 3)}).double()
    for sizes in ((6, 7), (5, 5), (6, 3), (5, 10)):
        x = normal(*sizes, 4)

        def losses(x: Tensor) -> Tensor:
            rows = model["head"](model["body"](x).tanh().flatten(0, 1)).square()
            return rows.view(len(x), -1).sum(1)

        model.zero_grad()
        truth = one_at_a_time(model, losses(x))
        with ab.observe(model) as ledger:
            losses(x).sum().backward()
        assert_exact(ledger, model, truth)


def test_inputs_that_are_no_tensors_need_their_number():
    class Words(nn.EmbeddingBag):
        def forward(self, words: list[str]) -> Tensor:
            return super().forward(torch.tensor([[ord(c) - 97 for c in word] for word in words]))

    torch.manual_seed(0)
    model, words = Words(26, 3).double(), ["abc", "bcd", "xyz", "aaa"]
    truth = one_at_a_time(model, model(words).square().sum(1))
    with ab.observe(model), pytest.raises(LedgerError, match="was given no tensor"):
        model(words)
    with ab.observe(model, examples=4) as ledger:
        model(words).square().sum(1).sum().backward()
    assert_exact(ledger, model, truth)


def test_a_wrong_number_of_examples_is_refused():
    model = linear().double()
    with ab.observe(model, examples=5), pytest.raises(LedgerError, match="without any: the model"):
        model(normal(6, 4)).sum().backward()


def test_a_model_that_gives_a_loss_alone_is_refused():
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    with ab.observe(model := Loss(4, 3)), pytest.raises(LedgerError, match="a row for each"):
        model(torch.ones(6, 4)).backward()
