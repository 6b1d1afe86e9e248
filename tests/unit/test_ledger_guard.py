"""Code that the ledger cannot see, or cannot take apart, is detected at every step.

Its examples then go back one after the other; where they are coupled, the model is refused by name.

Where a model is fine, it is let through: oracle `ledger_cases.one_at_a_time`, plain autograd of
each example alone, tolerance `ledger_cases.BOUND`. The controls are the figures that would be
wrong, or the unobserved update, which goes through.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger.ledger import Observe
from ledger_cases import assert_as_one_at_a_time, values

OBJECTIVE = ab.Objective(lambda model, batch: values(model, batch))


class Call(nn.Module):
    """Modules, and a function of them and of the inputs."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function, self.step = forward, 0
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def observe(model: nn.Module, *batch: Tensor, **others: Any) -> ab.Gradient:
    objective = others.pop("objective", OBJECTIVE)
    return ab.batch_gradient(model, objective, batch, observe=Observe(), **others)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def script() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scripting is deprecated
        return torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))


UNSEEN: dict[str, Callable[[], nn.Module]] = {
    "scripted code": lambda: Call(lambda m, x: m.hidden(x), hidden=script()),
    "a function with a gradient of its own": lambda: Call(
        lambda m, x: Scaled.apply(x, m.hidden), hidden=nn.Parameter(torch.randn(4))
    ),
    "a parameter changed by such a function": lambda: Call(
        lambda m, x: x @ Scaled.apply(m.hidden, m.hidden.detach()).view(4, 1),
        hidden=nn.Parameter(torch.randn(4)),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_use_that_is_not_seen_is_named_and_goes_one_by_one(name, caplog):
    model, x = UNSEEN[name]().double(), normal(6, 4)
    assert_as_one_at_a_time(model, (x,))
    (message,) = caplog.messages
    assert re.search(r"one after the other.*reached hidden.* past the ledger", message)
    model.requires_grad_(False)
    model.rest = nn.Linear(4, 2).double()
    model.function = lambda m, x, inner=model.function: inner(m, x).sum(1, keepdim=True) + m.rest(x)
    assert_as_one_at_a_time(model, (x,))  # and frozen, too


@pytest.mark.parametrize("name", UNSEEN)
def test_the_guard_is_awake_at_every_step(name):
    model = UNSEEN[name]().double()
    inner = model.function
    model.last = nn.Linear(4, 2).double()
    model.function = lambda m, x: m.last(x) + (inner(m, x).sum() if m.step == 2 else 0)
    x = normal(6, 4)
    observe(model, x)
    model.step = 1
    observe(model, x)
    model.step = 2
    with pytest.raises(LedgerError, match="hidden"):
        observe(model, x)
    assert all(p.grad is None for p in model.parameters())  # no half of a gradient is left
    model.step = 3
    assert_as_one_at_a_time(model, (x,))


def test_a_branch_that_is_taken_later_is_seen():
    model = Call(
        lambda m, x: m.b(m.a(x)) if m.step else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
    )
    model, x = model.double(), normal(6, 3, 4)
    assert_as_one_at_a_time(model, (x,))
    model.step = 1
    assert_as_one_at_a_time(model, (x,))


def test_a_later_branch_laid_out_otherwise_is_found_at_once(caplog):
    model = Call(
        lambda m, x: m.b(x.transpose(0, 1)).tanh().transpose(0, 1) if m.step else m.a(x),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
    ).double()
    x = normal(6, 6, 4)
    assert_as_one_at_a_time(model, (x,))
    model.step = 1
    assert_as_one_at_a_time(model, (x,))
    assert caplog.messages == []


def shuffle(model: nn.Module, x: Tensor) -> Tensor:
    """Rows of all examples in another order, as in routing to experts, and back."""
    rows = x.flatten(0, 1)
    order = 7 * torch.arange(len(rows)) % len(rows)
    return model.hidden(rows[order])[order.argsort()].view(*x.shape[:2], -1)


def sort_rows(model: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return model.hidden(x[order])[order.argsort()]


def choose_rows(model: nn.Module, x: Tensor) -> Tensor:
    """Some rows of all examples: as many as there happen to be."""
    mask = x.mean(-1) > -0.3
    y = torch.zeros(*x.shape[:2], 3, dtype=x.dtype)
    y[mask] = model.hidden(x[mask])
    return y


def index_by_example(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model.hidden(row[None]) for row in x])


@pytest.mark.parametrize("function", [shuffle, sort_rows, choose_rows, index_by_example])
def test_rows_that_are_mixed_have_the_figures_of_each_example_alone(function):
    model = Call(
        lambda m, x: function(m, m.first(x)), hidden=nn.Linear(4, 3), first=nn.Linear(4, 4)
    ).double()
    assert_as_one_at_a_time(model, (normal(6, 2, 4),))


@pytest.mark.parametrize("function", [shuffle, sort_rows])
def test_rows_of_the_input_may_be_mixed_and_put_back(function):
    model = Call(function, hidden=nn.Linear(4, 3)).double()
    assert_as_one_at_a_time(model, (normal(6, 2, 4),))


@pytest.mark.parametrize("function", [choose_rows, sort_rows])
@pytest.mark.parametrize("shape", [(6, 2, 4), (4, 3, 4), (8, 2, 4)])
def test_rows_that_change_places_only_later_are_followed_then(function, shape):
    """Run steps in which all rows are selected, or happen to be in order, and then others."""
    model = Call(
        lambda m, x: m.last(function(m, m.first(x))),
        hidden=nn.Linear(4, 3),
        first=nn.Linear(4, 4),
        last=nn.Linear(3, 3),
    ).double()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(4))
        model.first.bias.zero_()
    x = normal(*shape).abs() + 1
    in_order = x[x[:, 0, 0].argsort()]
    assert_as_one_at_a_time(model, (in_order,))
    assert_as_one_at_a_time(model, (2 * in_order,))
    in_order[1::2] *= -1  # half of the rows: as many as examples, where there are two each
    assert_as_one_at_a_time(model, (in_order,))


def test_frequencies_are_refused_with_what_to_do():
    with pytest.raises(LedgerError, match="Use scale_grad_by_freq=False"):
        observe(nn.Embedding(5, 3, scale_grad_by_freq=True), torch.randint(5, (6, 2)))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.01 * x.mean(0)


def across(model: nn.Module, batch: Any) -> Tensor:
    """A contrastive loss whose negatives are the other examples."""
    (x,) = batch
    y = F.normalize(model(x), dim=1)
    return F.cross_entropy(y @ y.roll(1, 1).T, torch.arange(len(y)), reduction="none")


COUPLED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a module": (
        lambda: nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 2)),
        r"from the Centred '1' on.* Use GroupNorm or LayerNorm",
    ),
    "attention over the batch": (
        lambda: Call(
            lambda m, x: m.a(x[:, None], x[:, None], x[:, None])[0], a=nn.MultiheadAttention(4, 2)
        ),
        r"from the MultiheadAttention 'a' on.*attend over dimensions that examples do not share",
    ),
    "a forward of one's own": (
        lambda: Call(lambda m, x: m.l(x) / m.l(x).std(0), l=nn.Linear(4, 2)),
        "from the model's own forward or the loss on",
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_examples_that_are_coupled_are_refused_with_the_module_and_what_to_do(name):
    build, message = COUPLED[name]
    model, x = build().double(), normal(6, 4)
    with pytest.raises(LedgerError, match=message):
        observe(model, x)
    ab.batch_gradient(model, OBJECTIVE, (x,))


def test_a_loss_across_the_batch_is_refused_and_may_be_a_reduction():
    model, x = nn.Linear(4, 4).double(), normal(6, 4)
    with pytest.raises(LedgerError, match="put a loss across the batch into the reduction"):
        observe(model, x, objective=ab.Objective(across))

    def contrastive(losses: ab.ExampleLosses) -> Tensor:
        return across(nn.Identity(), (losses.values,)).mean()

    objective = ab.Objective(lambda m, b: m(b[0]), reduction=contrastive)
    gradient = observe(nn.Linear(4, 4).double(), x, objective=objective)
    assert gradient.ledger is not None


def test_coupled_examples_are_refused_where_dropout_hides_the_halves():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Centred(), nn.Linear(4, 2)).double()
    with pytest.raises(LedgerError, match="couple"):
        observe(model, normal(6, 4), key=ab.Key(0, 0))


def test_batch_normalisation_is_refused_in_training_and_fine_in_evaluation():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double(), normal(6, 4)
    with pytest.raises(LedgerError, match=r"BatchNorm1d '1'.*evaluation mode, use GroupNorm"):
        observe(model, x)
    assert_as_one_at_a_time(model.eval(), (x,))


class Counting(nn.Module):
    """A buffer that every forward pass moves, and a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.l(x), 0.2)


def test_looking_for_examples_leaves_no_trace():
    x, models, states = normal(6, 4), [], []
    for observation in (None, Observe()):
        torch.manual_seed(0)
        model = Counting().double()
        for step in range(3):
            ab.batch_gradient(model, OBJECTIVE, (x,), key=ab.Key(1, step), observe=observation)
        models.append({**model.state_dict(), **{n: p.grad for n, p in model.named_parameters()}})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for name, plain in models[0].items():
        tolerance = 0 if "grad" not in name else 1e-12
        torch.testing.assert_close(models[1][name], plain, rtol=1e-12, atol=tolerance)


def test_nothing_is_left_changed_by_a_refusal():
    centred = Call(lambda m, x: Centred()(m.hidden(x)), hidden=nn.Linear(4, 3))
    model = nn.Sequential(nn.Linear(4, 4), centred).double()
    x = normal(6, 2, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(LedgerError, match="couples examples"):
        observe(model, x)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


FINE: dict[str, Callable[[], nn.Module]] = {
    "a bias of keys, whose gradient is 0 but for rounding": lambda: Call(
        lambda m, x: F.scaled_dot_product_attention(x, m.k(x), x), k=nn.Linear(4, 4)
    ),
    "losses of all sizes": lambda: Call(
        lambda m, x: m.l(x) * 10 ** (6 * x[:, :1, :1].tanh()), l=nn.Linear(4, 2)
    ),
    "a gradient of 0": lambda: Call(
        lambda m, x: m.l(x) * 0 + m.k(x), l=nn.Linear(4, 2), k=nn.Linear(4, 2)
    ),
    "running statistics of instances": lambda: nn.InstanceNorm1d(
        3, affine=True, track_running_stats=True
    ),
    "group norm": lambda: nn.GroupNorm(3, 3),
    "a mean over the rows of an example": lambda: Call(
        lambda m, x: m.l(x) - m.l(x).mean(1, keepdim=True), l=nn.Linear(4, 2)
    ),
}


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_fine_is_not_refused(name, dtype):
    model, x = FINE[name]().to(dtype), torch.randn(6, 3, 4, dtype=dtype)
    assert observe(model, x).ledger is not None
    if dtype == torch.float64:
        assert_as_one_at_a_time(model, (x,))
