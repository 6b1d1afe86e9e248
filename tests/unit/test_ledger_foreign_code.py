"""Code that the ledger cannot see into, and parameters that are made of others.

Scripted and traced modules, functions with gradients of their own, `torch.func` and second
derivatives in the loss go one example at a time. Compiled modules, pruning masks, weight norms,
low-rank adapters and positions that are repeated over the batch are seen.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone; under dropout, plain
autograd of each loss on the graph of the whole batch, drawn from the same seed. Tolerance:
`ledger_cases.BOUND` in float64. The controls: the oracle catches a parameter that counts twice, and
examples that are coupled are refused whatever else they go through.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger.ledger import Observe
from ledger_cases import (
    BOUND,
    assert_as_one_at_a_time,
    observe_figures,
    one_at_a_time,
    trainable,
    values,
    worst,
)
from test_ledger_foreign_rows import Call, normal

pytestmark = [  # torch says so of its own calls, in torch.func and in compiling
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
SIZES = (5, 4, 2, 1)  # 4 and 5 are sizes of layers too
SLOW = "The ledger takes examples one after the other"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


def without_warnings(make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting and the old weight_norm are deprecated
        return make(*arguments)


def script() -> nn.Module:
    return nn.Sequential(network(), without_warnings(torch.jit.script, network()))


def trace() -> nn.Module:
    inner = network().double()
    return nn.Sequential(
        network(), without_warnings(torch.jit.trace, inner, torch.zeros(2, 4, dtype=torch.float64))
    )


class Scaled(torch.autograd.Function):
    """x * w, with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return d * w, (d * x).sum(0)


def over_examples(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(model.net)(x)


def call_functionally(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.net.named_parameters())
    return torch.vmap(lambda row: torch.func.functional_call(model.net, parameters, (row,)))(x)


def hessians(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.hessian(lambda row: model.net(row).sum()))(x).flatten(1)


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(model.net))(x).flatten(1)


def adapt(model: nn.Module, x: Tensor) -> Tensor:
    """A step of gradient descent for each example by itself, as in meta-learning."""
    parameters = dict(model.net.named_parameters())

    def loss(weights: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(model.net, weights, (row,)).square().sum()

    def one(row: Tensor) -> Tensor:
        slopes = torch.func.grad(loss)(parameters, row)
        weights = {name: p - 0.1 * slopes[name] for name, p in parameters.items()}
        return torch.func.functional_call(model.net, weights, (row,))

    return torch.vmap(one)(x)


def slopes(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model.net(x).sum(), x, create_graph=True)
    return slope


UNSEEN: dict[str, Callable[[], nn.Module]] = {
    "scripted inside": script,
    "scripted": lambda: without_warnings(torch.jit.script, network()),
    "traced inside": trace,
    "a function": lambda: Call(
        lambda m, x: Scaled.apply(m.net(x), m.scale), net=network(), scale=torch.randn(4)
    ),
    "row by row": lambda: Call(lambda m, x: torch.stack([m.net(r) for r in x]), net=network()),
    "vmap": lambda: Call(over_examples, net=network()),
    "functional_call": lambda: Call(call_functionally, net=network()),
    "hessian": lambda: Call(hessians, net=network()),
    "jacrev": lambda: Call(jacobians, net=network()),
    "adapted to each example": lambda: Call(adapt, net=network()),
    "slopes": lambda: Call(slopes, net=network()),
    "slopes of a scripted module": lambda: Call(
        slopes, net=without_warnings(torch.jit.script, network())
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_code_that_cannot_be_seen_into_has_the_figures_of_each_example_alone(name):
    model = UNSEEN[name]().double()
    for size in SIZES:
        assert_as_one_at_a_time(model, (normal(size, 4),))


def test_the_slow_way_is_named_once_with_its_cause_and_price(caplog):
    model = script().double()
    for size in (5, 4, 3):
        observe_figures(model, (normal(size, 4),))
    (message,) = caplog.messages
    assert message.startswith(SLOW)
    assert "as many backward passes as there are examples" in message
    assert "1.0.weight" in message


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_seen_as_it_was_written(backend, caplog):
    compiled = torch.compile(network(), backend=backend)
    for model in (compiled, nn.Sequential(nn.Linear(4, 4), compiled, nn.Linear(4, 2))):
        model.double()
        for size in SIZES:
            assert_as_one_at_a_time(model, (normal(size, 4),))
    assert not [message for message in caplog.messages if message.startswith(SLOW)]


def measure_spread(losses: ab.ExampleLosses) -> Tensor:
    """Couples the examples: how alike their values [B, k] are."""
    unit = F.normalize(losses.values, dim=1)
    return (unit @ unit.T).square().mean()


def two_terms(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    outputs = model(batch[0])
    return {"spread": outputs, "size": outputs.square().sum(1)}


OBJECTIVES = {
    "clipped": (ab.Objective(values), ab.ClipExamples(1.0)),
    "terms": (
        ab.Objective(two_terms, reduction={"spread": measure_spread, "size": ab.Max()}),
        None,
    ),
}


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_by_one_has_the_figures_of_a_model_that_is_seen(name, micro_batch):
    objective, clip = OBJECTIVES[name]
    plain, x = network().double(), normal(5, 4)
    unseen = without_warnings(torch.jit.script, network()).double()
    unseen.load_state_dict(plain.state_dict())
    vectors = []
    for model in (plain, unseen):
        gradient = ab.batch_gradient(
            model,
            objective,
            (x,),
            observe=Observe(norms=True, share=True),
            clip=clip,
            layout=ab.Layout(micro_batch=micro_batch),
        )
        assert gradient.ledger is not None
        parts = [
            gradient.ledger.norms,
            gradient.ledger.share,
            *(p.grad for p in model.parameters()),
        ]
        vectors.append(torch.cat([t.flatten() for t in parts]))
    torch.testing.assert_close(*vectors, rtol=1e-10, atol=1e-12)


def test_one_by_one_draws_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), script()).double()
    key, x, parameters = ab.Key(0, 0), normal(5, 4), trainable(model)
    objective = ab.Objective(values)
    gradient = ab.batch_gradient(model, objective, (x,), key=key, observe=Observe(gradients=True))
    torch.manual_seed(key.grain(0))
    v = values(model, (x,))
    assert gradient.ledger is not None
    assert gradient.ledger.gradients is not None
    for i in range(5):
        plain = torch.autograd.grad(v[i], list(parameters.values()), retain_graph=True)
        for name, g in zip(parameters, plain, strict=True):
            gradient_of_one = gradient.ledger.gradients[name][i]
            assert (gradient_of_one - g).norm() <= BOUND[torch.float64] * g.norm()


def test_a_loss_that_is_written_for_one_batch_size_is_looked_at_with_all_examples():
    model = Call(lambda m, x: m.net(x) + torch.arange(8.0)[:, None], net=network()).double()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum(1)

    x, parameters = normal(8, 4), trainable(model)
    gradient = ab.batch_gradient(model, ab.Objective(losses), (x,), observe=Observe())
    v = losses(model, (x,))
    plain = [
        torch.stack([g.norm() for g in torch.autograd.grad(value, parameters.values(), None, True)])
        for value in v
    ]
    assert gradient.ledger is not None
    torch.testing.assert_close(gradient.ledger.norms, torch.stack(plain).norm(dim=1))
    with pytest.raises(RuntimeError, match="size of tensor"):  # the user's own error comes as it is
        ab.batch_gradient(model, ab.Objective(losses), (x[:7],), observe=Observe())


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_by_one_goes_through_checkpointed_layers(reentrant):
    model = Call(
        lambda m, x: checkpoint(m.hidden, m.first(x), use_reentrant=reentrant),
        first=nn.Linear(4, 4),
        hidden=Call(
            lambda m, x: Scaled.apply(m.net(x), m.scale), net=network(), scale=torch.randn(4)
        ),
    ).double()
    assert_as_one_at_a_time(model, (normal(5, 4),))


@pytest.mark.parametrize("draws", [False, True])
def test_coupled_examples_are_refused_in_code_that_cannot_be_seen_into(draws):
    def centre(model: nn.Module, x: Tensor) -> Tensor:
        y = F.dropout(model.net(x), 0.5, training=draws)
        return y - 0.01 * y.mean(0)

    model = Call(centre, net=without_warnings(torch.jit.script, network())).double()
    with pytest.raises(LedgerError, match="couples examples"):
        ab.batch_gradient(
            model, ab.Objective(values), (normal(5, 4),), key=ab.Key(0, 0), observe=Observe()
        )


def prune_weight() -> nn.Module:
    model = network()
    prune.random_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "bias", 0.3)
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    return model


def normalise_weight(norm: Callable[..., nn.Module], **how: Any) -> nn.Module:
    return nn.Sequential(
        without_warnings(lambda: norm(nn.Linear(4, 5), **how)),
        nn.Tanh(),
        without_warnings(lambda: norm(nn.Linear(5, 5), **how)),
    )


class DoRA(nn.Module):
    """W = m (W_0 + B A) / |W_0 + B A|, by rows. Source: Liu et al. 2024, 2402.09353, eq. 5."""

    def __init__(self, inputs: int, outputs: int, *, is_split: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, inputs))
        self.b = nn.Parameter(torch.randn(outputs, 2))
        self.m = nn.Parameter(torch.rand(outputs) + 0.5)
        self.is_split = is_split

    def forward(self, x: Tensor) -> Tensor:
        if self.is_split:
            return self._split(x)
        weight = self.base.weight + self.b @ self.a
        return F.linear(x, weight * (self.m / weight.norm(dim=1))[:, None], self.base.bias)

    def _split(self, x: Tensor) -> Tensor:
        """Compute the same by two products, as peft does, with the norm as a constant."""
        ones = torch.eye(self.a.shape[1], dtype=x.dtype)
        weight = self.base.weight + F.linear(F.linear(ones, self.a), self.b).T
        scale = (self.m / weight.norm(dim=1).detach()).view(1, -1)
        base, low = F.linear(x, self.base.weight), F.linear(F.linear(x, self.a), self.b)
        return base + (scale - 1) * base + scale * low


MADE: dict[str, Callable[[], nn.Module]] = {
    "pruned": prune_weight,
    "weight_norm with a hook": lambda: normalise_weight(nn.utils.weight_norm),
    "weight_norm of the whole": lambda: normalise_weight(nn.utils.weight_norm, dim=None),
    "weight_norm": lambda: normalise_weight(parametrizations.weight_norm),
    "spectral_norm with a hook": lambda: normalise_weight(nn.utils.spectral_norm).eval(),
    "spectral_norm": lambda: normalise_weight(parametrizations.spectral_norm).eval(),
    "orthogonal": lambda: normalise_weight(parametrizations.orthogonal),
    **{
        f"DoRA, {kind}, {width} wide": lambda is_split=kind == "split", width=width: nn.Sequential(
            DoRA(4, width, is_split=is_split), nn.Tanh(), DoRA(width, 3, is_split=is_split)
        )
        for kind in ("whole", "split")
        for width in (2, 4, 5, 8)
    },
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_parameters_alone_belongs_to_all_examples(name, caplog):
    model = MADE[name]().double()
    for size in (*SIZES, 8, 10):
        assert_as_one_at_a_time(model, (normal(size, 4),))
    assert caplog.messages == []


def positions(join: Callable[[Tensor, int], Tensor]) -> nn.Module:
    """Products of each example with positions [2, 3, 5] that are joined to [2 B, 3, 5]."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        rows = model.a(x).view(-1, 1, 3)  # 2 an example
        return torch.bmm(rows, join(model.p, len(x)).reshape(-1, 3, 5)).view(len(x), -1)

    return Call(forward, a=nn.Linear(4, 6), p=torch.randn(2, 3, 5))


JOINED: dict[str, Callable[[], nn.Module]] = {
    "repeat": lambda: positions(lambda p, size: p.repeat(size, 1, 1)),
    "tile": lambda: positions(lambda p, size: torch.tile(p, (size, 1, 1))),
    "cat": lambda: positions(lambda p, size: torch.cat([p] * size)),
    "stack": lambda: positions(lambda p, size: torch.stack([p] * size)),
    "expand": lambda: positions(lambda p, size: p.expand(size, 2, 3, 5)),
    "repeat_interleave": lambda: positions(
        lambda p, size: p.repeat_interleave(size, 0).view(2, size, 3, 5).transpose(0, 1)
    ),
    "two parameters": lambda: Call(
        lambda m, x: torch.cat([torch.stack([torch.cat([m.p, m.q])] * len(x)), m.a(x)[:, None]], 1),
        a=nn.Linear(4, 5),
        p=torch.randn(1, 5),
        q=torch.randn(2, 5),
    ),
    "written in place": lambda: Call(
        lambda m, x: m.a(x)[:, None] * (2 * m.p).div_(torch.tensor(3.0)), a=nn.Linear(4, 5),
        p=torch.randn(1, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_parameters_that_are_joined_over_the_batch_are_copies_for_each_example(name, caplog):
    model = JOINED[name]().double()
    for size in SIZES:
        assert_as_one_at_a_time(model, (normal(size, 4),))
    assert caplog.messages == []


def test_the_oracle_tells_a_parameter_that_counts_twice():  # the control
    model, batch = UNSEEN["scripted inside"]().double(), (normal(5, 4),)
    figures, truth = observe_figures(model, batch), one_at_a_time(model, batch)
    twice = {name: 4 * squares for name, squares in figures.squares.items()}
    assert worst(figures._replace(squares=twice), truth) > 1e-2
