"""Norms that are read from autograd's own graph, without watching the forward pass.

Oracle: the gradient of each value by `torch.autograd.grad`, in float64. Tolerance 1e-9, since sums
are taken in another order. The gradient of the batch must have the bits of an unobserved update.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger import graph_form, graph_pass, watched_pass
from anybatch.ledger.contractions.base import PerExample

SIZE, BOUND = 12, 1e-9
X = torch.linspace(-2, 2, SIZE * 6, dtype=torch.float64).sin().view(SIZE, 6)
Y = torch.arange(SIZE) % 3
Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Two layers whose forward pass is a function of the test."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6, bias=False)
        self.scale, self.norm = nn.Parameter(torch.ones(6)), nn.LayerNorm(6)
        self.drop, self.steps, self.run = nn.Dropout(0.5), 0, forward
        self.double()
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.run(self, x)


READ: dict[str, Forward] = {
    "two layers": lambda m, x: m.b(m.a(x).relu()),
    "one layer": lambda m, x: m.b(x),
    "no bias": lambda m, x: m.b(m.c(x).tanh()),
    "one matrix twice": lambda m, x: m.b(m.a(m.a(x).sigmoid()).tanh()),
    "a shortcut": lambda m, x: m.b(x + F.gelu(m.a(x))),
    "a product": lambda m, x: m.b(m.a(x) * m.c(x).sigmoid()),
    "two halves": lambda m, x: m.b(torch.cat([m.a(x)[:, :3], m.c(x)[:, 3:]], 1)),
    "attention over two": lambda m, x: m.b((m.a(x).view(-1, 2, 3).softmax(1)).flatten(1)),
    "its own statistics": lambda m, x: m.b(m.a(x) - m.a(x).mean(1, keepdim=True)),
    "a matrix product": lambda m, x: m.b(F.silu(x @ m.c.weight)),
    "a transposed one": lambda m, x: m.b(F.elu(x @ m.c.weight.T)),
    "addmm": lambda m, x: m.b(torch.addmm(m.a.bias, x, m.a.weight).tanh()),
    "in place": lambda m, x: m.b(m.a(x).relu_()),
    "dropout that is off": lambda m, x: m.b(m.drop(m.a(x))),
    "a detached part": lambda m, x: m.b(m.a(x).tanh() + m.c(x).detach()),
}
WATCHED: dict[str, Forward] = {
    "a factor": lambda m, x: m.b(m.scale * m.a(x)),
    "a norm": lambda m, x: m.b(m.norm(m.a(x))),
    "a row added up": lambda m, x: m.b(m.a(x.view(-1, 2, 3).repeat(1, 1, 2)).sum(1)),
    "addmm with a factor": lambda m, x: m.b(torch.addmm(m.a.bias, x, m.a.weight, beta=2)),
    "the parameter alone": lambda m, x: m.b(x) + m.c.weight.square().sum(),
    "an index": lambda m, x: m.b(m.a(x)[torch.arange(len(x))]),
    "a sort of each row": lambda m, x: m.b(m.a(x).sort(1).values),
    "a Function": lambda m, x: m.b(Double.apply(m.a(x))),
    "a checkpoint": lambda m, x: m.b(
        torch.utils.checkpoint.checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=True)
        if x.requires_grad
        else m.a(x).cumsum(1)
    ),
}
MIXES: dict[str, Forward] = {
    "a mean over the batch": lambda m, x: m.b(m.a(x) - m.a(x).mean(0)),
    "a softmax over the batch": lambda m, x: m.b(m.a(x).softmax(0)),
    "rows times rows": lambda m, x: m.b((m.a(x) @ m.c(x).T) @ x),
    "a broadcast column": lambda m, x: m.b(m.a(x) + m.c(x).sum(1)[None, :].mean(1, keepdim=True)),
    "a column along the rows": lambda m, x: m.b(
        (torch.cat([m.a(x), m.c(x)], 1) + m.a(x).sum(1))[:, :6].tanh()
    ),
    "two rows as one": lambda m, x: m.b(m.a(x).view(-1, 12).softmax(1).view(-1, 6)),
    "a flip": lambda m, x: m.b(m.a(x) + m.a(x).flip(0)),
}


class Double(torch.autograd.Function):
    """A function with a gradient of its own, under a name like torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return 2 * d


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def roads(monkeypatch) -> list[str]:
    """Read the graph from the first step on, and list the passes that did."""
    roads: list[str] = []
    go_back = graph_pass.GraphPass.backward

    def record(self: Any, *args: Any, **how: Any) -> Any:
        result = go_back(self, *args, **how)
        roads.append("graph")
        return result

    monkeypatch.setattr(graph_pass.GraphPass, "backward", record)
    monkeypatch.setattr(watched_pass, "_FIRST_STEPS", 0)
    return roads


def true_norms(model: nn.Module, values: Tensor) -> Tensor:
    weights = list(model.parameters())
    norms = []
    for v in values:
        gradients = torch.autograd.grad(v, weights, retain_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    return torch.stack(norms)


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def observe(model: nn.Module, objective: ab.Objective | None = None, **how: Any) -> ab.Gradient:
    how = {"observe": ab.Observe(), **how}
    return ab.batch_gradient(model, objective or ab.Objective(losses), (X, Y), **how)


@pytest.mark.parametrize("name", READ)
def test_norms_are_right_and_the_gradient_keeps_its_bits(name, roads):
    model = Net(READ[name])
    plain = ab.batch_gradient(model, ab.Objective(losses), (X, Y))
    bits = [p.grad.clone() for p in model.parameters()]
    gradient = observe(model)
    assert roads == ["graph"]
    assert distance(gradient.ledger.norms, true_norms(model, losses(model, (X, Y)))) < BOUND
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), bits, strict=True))
    assert gradient.loss == plain.loss


@pytest.mark.parametrize("name", WATCHED)
def test_other_uses_and_operations_are_watched(name, roads):
    model = Net(WATCHED[name])
    for _ in range(2):
        norms = observe(model).ledger.norms
        assert distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND
    assert roads == []


def is_right_or_refused(model: nn.Module) -> bool:
    try:
        norms = observe(model).ledger.norms
    except LedgerError as error:
        return "couples examples" in str(error)
    return distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND


@pytest.mark.parametrize("name", MIXES)
def test_operations_that_mix_rows_are_not_read(name, roads):
    assert is_right_or_refused(Net(MIXES[name]))
    assert roads == []


def test_a_wrong_use_fails(roads, monkeypatch):  # the control
    monkeypatch.setattr(graph_form, "_make_bias", lambda node, d, size: PerExample(2 * d))
    rules = {("AddmmBackward0", 0, "AccumulateGrad"): graph_form._make_bias}
    monkeypatch.setattr(graph_form, "_RULES", graph_form._RULES | rules)
    model = Net(READ["two layers"])
    norms = observe(model).ledger.norms  # plain autograd does not confirm the form
    assert roads == []
    assert distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND


@pytest.mark.parametrize("layout", [ab.Layout(5), ab.Layout((2, 7, 3)), ab.Layout(4)], ids=str)
def test_micro_batches(layout, roads):
    model = Net(READ["one matrix twice"])
    norms = observe(model, layout=layout).ledger.norms
    assert set(roads) == {"graph"}
    assert distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND


def test_all_quantities(roads):
    model = Net(READ["a shortcut"])
    quantities = {"alignment": True, "share": True, "parameter_norms": True, "projections": 16}
    ledger = observe(model, observe=ab.Observe(**quantities)).ledger
    assert roads == ["graph"]
    watched = observe(model, observe=ab.Observe(gradients=True, projections=16)).ledger
    assert roads == ["graph"]
    values, weights = losses(model, (X, Y)), dict(model.named_parameters())
    rows = {name: [] for name in watched.gradients}
    for v in values:
        gradients = torch.autograd.grad(
            v, [weights[name] for name in rows], retain_graph=True, materialize_grads=True
        )
        for name, g in zip(rows, gradients, strict=True):
            rows[name].append(g)
    each = {name: torch.stack(g) for name, g in rows.items()}
    flat = torch.cat([g.flatten(1) for g in each.values()], 1)
    alignment = flat @ flat.mean(0)
    assert distance(ledger.alignment, alignment) < BOUND
    assert distance(ledger.share, alignment / alignment.sum()) < BOUND
    for name, g in each.items():
        assert torch.allclose(watched.gradients[name], g, rtol=1e-9, atol=1e-12)
        assert torch.allclose(ledger.parameter_norms[name], g.flatten(1).norm(dim=1))
    assert distance(ledger.projections, watched.projections) < BOUND


@pytest.mark.parametrize(
    "how",
    [
        {"clip": ab.ClipExamples(0.1)},
        {"objective": ab.Objective(losses, ab.TopFraction(0.5))},
        {"objective": ab.Objective(losses, ab.Tilted(1.0)), "layout": ab.Layout(4)},
        {"bitwise": True, "objective": ab.Objective(losses, grain=4), "key": ab.Key(0, 0)},
    ],
    ids=["clipped", "top", "tilted", "bitwise"],
)
def test_other_weights_than_one_for_all_are_watched(how, roads):
    model = Net(READ["two layers"])
    norms = observe(model, **how).ledger.norms
    assert roads == []
    assert distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND


def test_counts_and_an_example_without_any(roads):
    counts = torch.arange(SIZE) % 4

    def tokens(model: nn.Module, batch: Any) -> ab.ExampleLosses:
        n = counts if len(batch[0]) == SIZE else torch.ones(len(batch[0]), dtype=torch.long)
        return ab.ExampleLosses(losses(model, batch) * n, counts=n)

    model = Net(READ["two layers"])
    norms = observe(model, ab.Objective(tokens)).ledger.norms
    assert roads == []  # their weights are 0, so the pass is made again, and watched
    expected = torch.where(counts > 0, true_norms(model, losses(model, (X, Y))), 0)
    assert distance(norms, expected) < BOUND


def test_a_branch_is_seen_when_it_is_taken(roads):
    model = Net(lambda m, x: m.b(m.a(x)) if m.early else m.b(m.scale * m.a(x)))
    model.early = True
    observe(model)
    model.early = False
    norms = observe(model).ledger.norms
    assert roads == ["graph"]
    assert distance(norms, true_norms(model, losses(model, (X, Y)))) < BOUND


@pytest.mark.parametrize("frozen", [[], ["a.weight", "b.weight"]], ids=["trained", "biases alone"])
def test_rows_that_become_more_than_the_examples_are_watched(frozen, roads):
    """The graph keeps its form: sequences of length 1, and then of length 2."""

    def lengths(model: nn.Module, batch: Any) -> Tensor:
        values = model(batch[0].reshape(-1, 6)).square().sum(1)
        return values.view(len(batch[0]), -1).sum(1)

    model = Net(READ["two layers"])
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    objective, long = ab.Objective(lengths), X.view(SIZE // 2, 2, 6)
    ab.batch_gradient(model, objective, (X[:, None],), observe=ab.Observe())
    assert roads == ["graph"]
    before = model.steps
    norms = ab.batch_gradient(model, objective, (long,), observe=ab.Observe()).ledger.norms
    assert roads == ["graph"]
    assert model.steps == before + 2  # one pass more, which is watched
    values, weights = lengths(model, (long,)), [p for p in model.parameters() if p.requires_grad]
    each = [torch.autograd.grad(v, weights, retain_graph=True, allow_unused=True) for v in values]
    expected = [torch.cat([g.flatten() for g in e if g is not None]).norm() for e in each]
    assert distance(norms, torch.stack(expected)) < BOUND


def test_a_batch_that_is_written_into_is_not_read_twice(roads):
    def write(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(1.0)
        return losses(model, batch)

    model = Net(READ["two layers"])
    for _ in range(3):
        ledger = observe(model, ab.Objective(write)).ledger
        assert distance(ledger.norms, true_norms(model, losses(model, (X, Y)))) < BOUND
    assert roads == ["graph"] * 2  # before the write was seen: the first pass had a copy


def test_dropout_runs_by_grain_with_its_own_draws(roads):
    model = Net(lambda m, x: m.b(m.drop(m.a(x).relu())))
    model.drop.train()
    objective = ab.Objective(losses, grain=4)
    read = observe(model, objective, key=ab.Key(0, 0)).ledger.norms
    assert roads == ["graph"] * 3
    watched = observe(model, objective, key=ab.Key(0, 0), clip=ab.ClipExamples(1e9)).ledger.norms
    assert len(roads) == 3
    assert distance(read, watched) < BOUND


def test_a_pass_is_freed_without_the_garbage_collector(roads, monkeypatch):
    collectors: list[Any] = []

    class Collector(graph_pass.GradientCollector):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            collectors.append(weakref.ref(self))

    monkeypatch.setattr(graph_pass, "GradientCollector", Collector)
    model = Net(READ["two layers"])
    observe(model)
    gc.collect()
    gc.disable()
    try:
        observe(model)
        assert roads == ["graph"] * 2
        assert collectors[-1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", [*READ, *WATCHED, *MIXES])
def test_only_graphs_that_keep_to_their_rows_have_uses(name):
    model = Net({**READ, **WATCHED, **MIXES}[name])
    names = {id(p): name for name, p in model.named_parameters()}
    nodes, _ = graph_form.list_nodes(losses(model, (X, Y)), names)
    uses = graph_form.find_uses(nodes, names, SIZE)
    if name not in READ:
        assert uses is None
    else:
        used = {parameter for of_node in uses.values() for parameter, _ in of_node}
        gradients = torch.autograd.grad(
            losses(model, (X, Y)).sum(), list(model.parameters()), allow_unused=True
        )
        assert used == {n for n, g in zip(names.values(), gradients, strict=True) if g is not None}
