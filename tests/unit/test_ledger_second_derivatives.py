"""Losses that differentiate a gradient, observed: gradient penalties, differential equations.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone, in float64; tolerance
`ledger_cases.BOUND`. The control is the first derivative alone, which is what a weight that is a
constant of the backward graph would leave: it must be far from the truth.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from anybatch.errors import LedgerError
from ledger_cases import BOUND, assert_as_one_at_a_time, observe_figures, one_at_a_time, worst

OBSERVE = ab.Observe()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def slope(model: nn.Module, x: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Scores [B] of a model, and their gradients [B, ...] by its inputs."""
    x = x.detach().clone().requires_grad_()
    score = model(x).flatten(1).sin().sum(1)
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=create_graph, retain_graph=True)
    return score, gradient


def wgan_gp(model: nn.Module, batch: Any, *, create_graph: bool = True) -> Tensor:
    score, gradient = slope(model, batch[0], create_graph=create_graph)
    return score + 10 * (gradient.flatten(1).norm(dim=1) - 1) ** 2


def tiny_penalty(model: nn.Module, batch: Any) -> Tensor:
    score, gradient = slope(model, batch[0], create_graph=True)
    return score.square() + 1e-6 * gradient.flatten(1).square().sum(1)


def r1_alone(model: nn.Module, batch: Any) -> Tensor:
    return slope(model, batch[0], create_graph=True)[1].flatten(1).square().sum(1)


def differential_equation(model: nn.Module, batch: Any) -> Tensor:
    """(u_xx + sin u)^2."""
    x = batch[0].detach().clone().requires_grad_()
    u = model(x)
    (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return (u_xx.flatten(1).sum(1) + u.flatten(1).sum(1).sin()) ** 2


def by_backward(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].detach().clone().requires_grad_()
    score = model(x).flatten(1).sin().sum(1)
    score.backward(torch.ones_like(score), create_graph=True, inputs=[x])
    return score + x.grad.flatten(1).square().sum(1)


def by_func_grad(model: nn.Module, batch: Any) -> Tensor:
    gradient = torch.func.grad(lambda x: model(x).sin().sum())(batch[0])
    return gradient.flatten(1).square().sum(1)


def by_jacrev(model: nn.Module, batch: Any) -> Tensor:
    jacobian = torch.func.jacrev(lambda x: model(x).flatten(1).sin().sum(0))(batch[0])
    return jacobian.movedim(1, 0).flatten(1).square().sum(1)


def by_jvp(model: nn.Module, batch: Any) -> Tensor:
    _, tangent = torch.func.jvp(lambda x: model(x).sin(), (batch[0],), (batch[0].cos(),))
    return tangent.flatten(1).square().sum(1)


def by_dual_numbers(model: nn.Module, batch: Any) -> Tensor:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(batch[0], batch[0].cos())
        tangent = forward_ad.unpack_dual(model(x).sin()).tangent
    return tangent.flatten(1).square().sum(1)


LOSSES = [
    wgan_gp,
    tiny_penalty,
    r1_alone,
    differential_equation,
    by_backward,
    by_func_grad,
    by_jacrev,
    by_jvp,
    by_dual_numbers,
]


class Elementwise(nn.Module):
    """Parameters that are multiplied and added, and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("bi,ij->bj", (x * self.scale).sin(), self.matrix) + self.shift).tanh()


class Outputs(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda x: self.a(x).tanh(), x, use_reentrant=False))


def perceptron(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 8), nn.Tanh(), nn.LayerNorm(8), nn.utils.weight_norm(nn.Linear(8, 1))
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (6, 4)),
    "as wide as the batch": (lambda: perceptron(6), (6, 6)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3), nn.Tanh(), nn.GroupNorm(1, 3), nn.Conv1d(3, 2, 2)
        ),
        (6, 2, 5),
    ),
    "elementwise": (Elementwise, (6, 4)),
    "checkpointed": (Checkpointed, (6, 4)),
    "rnn": (lambda: Outputs(nn.RNN(4, 3, batch_first=True)), (6, 3, 4)),
    "gru": (lambda: Outputs(nn.GRU(4, 3, num_layers=2, batch_first=True)), (6, 3, 4)),
    "lstm": (lambda: Outputs(nn.LSTM(4, 3, bidirectional=True, batch_first=True)), (6, 3, 4)),
}


def setting(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.fast(8)
@pytest.mark.parametrize("losses", LOSSES, ids=lambda losses: losses.__name__)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_what_differentiates_a_gradient_is_right(name, losses):
    model, x = setting(name)
    if losses is by_jacrev and x.ndim == 3 and name != "convolution":
        pytest.skip("its Jacobian is that of sums over time")
    if name == "checkpointed" and losses in (by_func_grad, by_jacrev, by_jvp, by_dual_numbers):
        pytest.skip("torch does not checkpoint inside torch.func")
    assert_as_one_at_a_time(model, (x,), losses)


def test_the_first_derivative_alone_is_far_from_the_truth():
    model, x = setting("elementwise")

    def without(model: nn.Module, batch: Any) -> Tensor:
        return wgan_gp(model, batch, create_graph=False)

    figures = observe_figures(model, (x,), without)
    assert worst(figures, one_at_a_time(model, (x,), wgan_gp)) > 0.1
    assert worst(figures, one_at_a_time(model, (x,), without)) < BOUND[torch.float64]


@pytest.mark.parametrize("losses", [wgan_gp, tiny_penalty, by_func_grad])
def test_a_penalty_that_begins_later_is_right_from_then_on(losses):
    model, x = setting("elementwise")
    assert_as_one_at_a_time(model, (x,), lambda model, batch: model(*batch).square().sum(1))
    assert_as_one_at_a_time(model, (x,), losses)
    assert_as_one_at_a_time(model, (x,), losses)


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """Examples moved along the sign of a gradient, which is not differentiated itself."""
    gradient = slope(model, batch[0], create_graph=False)[1]
    return model(batch[0] + 0.1 * gradient.sign()).flatten(1).square().sum(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_first_derivative_in_the_loss_is_right_as_before(name):
    model, x = setting(name)
    assert_as_one_at_a_time(model, (x,), adversarial)


def plain_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("name", ["elementwise", "convolution", "gru"])
def test_in_a_loop_of_ones_own_it_is_refused_once_and_right_from_then_on(name):
    model, x = setting(name)

    def loss() -> Tensor:
        return wgan_gp(model, (x,)).mean()

    expected = plain_gradients(model, loss)
    with (
        pytest.raises(LedgerError, match=r"differentiates a gradient.*create_graph=True.*again"),
        ab.observe(model),
    ):
        loss().backward()
    assert all(p.grad is None for p in model.parameters())
    with ab.observe(model) as ledger:
        loss().backward()
    rows = [p.grad for p in model.parameters() if p.grad is not None]
    for row, right in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, right, rtol=1e-10, atol=1e-10)  # sums in another order
    one = plain_gradients(model, lambda: wgan_gp(model, (x[2:3],)).mean() / len(x))
    norm = torch.stack([g.norm() for g in one]).norm()
    torch.testing.assert_close(ledger.norms[2], norm, rtol=1e-10, atol=0.0)


def test_a_backward_pass_of_the_whole_that_builds_a_graph_is_refused():
    model, x = setting("elementwise")
    with (
        pytest.raises(LedgerError, match="differentiates a gradient"),
        ab.observe(model),
    ):
        model(x).sum().backward(create_graph=True)


def gradient_by_parameters(model: nn.Module, batch: Any) -> Tensor:
    """A penalty on the gradient by the parameters, of all examples together."""
    losses = model(*batch).flatten(1).square().sum(1)
    gradients = torch.autograd.grad(
        losses.sum(), list(model.parameters()), create_graph=True, allow_unused=True
    )
    return losses + sum(g.square().sum() for g in gradients if g is not None)


def map_examples(model: nn.Module, batch: Any) -> Tensor:
    def one(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: model(x[None]).sin().sum())(x).square().sum()

    return torch.func.vmap(one)(batch[0])


@pytest.mark.parametrize(
    ("losses", "message"),
    [(gradient_by_parameters, "differentiates with respect to the parameter scale")],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_cannot_be_watched_is_refused_at_any_step(losses, message, later):
    model, x = setting("elementwise")
    if later:
        ab.batch_gradient(model, ab.Objective(r1_alone), (x,), observe=OBSERVE)
    with pytest.raises(LedgerError, match=message):
        ab.batch_gradient(model, ab.Objective(losses), (x,), observe=OBSERVE)


@pytest.mark.parametrize("later", [False, True])
def test_what_is_mapped_goes_one_by_one_at_any_step(later, caplog):
    model, x = setting("elementwise")
    if later:
        ab.batch_gradient(model, ab.Objective(r1_alone), (x,), observe=OBSERVE)
    ab.batch_gradient(model, ab.Objective(map_examples), (x,), observe=OBSERVE)
    assert "mul of scale is called inside torch.func.vmap" in caplog.text


class Once(torch.autograd.Function):
    """Identity whose backward pass can run only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.is_used = False
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        if ctx.is_used:
            raise RuntimeError("used up.")
        ctx.is_used = True
        return d


def test_a_graph_that_can_be_passes_of_unit_once_only_is_refused():
    model, x = setting("elementwise")
    objective = ab.Objective(lambda model, batch: Once.apply(model(*batch)).sum(1))
    with pytest.raises(LedgerError, match=r"several times, and torch does not allow it: used up"):
        ab.batch_gradient(model, objective, (x,), observe=OBSERVE)
    ab.batch_gradient(model, objective, (x,))
