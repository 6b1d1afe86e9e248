"""Complex values and parameters under the ledger's eyes.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone, in complex128; tolerance
`ledger_cases.BOUND`. The control is the conjugate of the gradient, which has the right norms.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.ledger.contractions import calls, einsum
from anybatch.ledger.contractions.linear import Product
from ledger_cases import (
    BOUND,
    assert_as_one_at_a_time,
    observe_figures,
    one_at_a_time,
    real,
    trainable,
    values,
    worst,
)

COMPLEX = torch.complex128


class Call(nn.Module):
    """A function of parameters or modules, and of the inputs; complex outputs become pairs."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return real(self.function(self, x))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=COMPLEX)


def pairs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def spectral_convolution(model: Any, x: Tensor) -> Tensor:
    """A layer of a Fourier neural operator."""
    modes = torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :3], model.w)
    return torch.fft.irfft(F.pad(modes, (0, 2)), n=7)


def state_space(model: Any, x: Tensor) -> Tensor:
    """Powers of complex decays, summed over time."""
    decay = torch.complex(-model.a.exp(), model.b)[:, None] * torch.arange(4)
    return torch.einsum("bt,nt->bn", x.to(COMPLEX), decay.exp()) @ model.w


spectrum = torch.fft.rfft
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matmul": (lambda: Call(lambda m, x: spectrum(x) @ m.w, w=normal(3, 3)), (6, 4)),
    "matmul of rows": (lambda: Call(lambda m, x: spectrum(x) @ m.w, w=normal(3, 3)), (6, 5, 4)),
    "as wide as the batch": (lambda: Call(lambda m, x: spectrum(x) @ m.w, w=normal(3, 3)), (3, 4)),
    "linear": (
        lambda: Call(lambda m, x: m.l(spectrum(x)), l=nn.Linear(3, 2, dtype=COMPLEX)),
        (6, 4),
    ),
    "linear, by inner products": (
        lambda: Call(lambda m, x: m.l(spectrum(x)), l=nn.Linear(33, 40, dtype=COMPLEX)),
        (6, 3, 64),
    ),
    "linear, by blocks": (
        lambda: Call(lambda m, x: m.l(spectrum(x)), l=nn.Linear(3, 2, dtype=COMPLEX)),
        (6, 30, 4),
    ),
    "linear twice": (
        lambda: Call(lambda m, x: m.l(m.l(spectrum(x)) * 2j), l=nn.Linear(3, 3, dtype=COMPLEX)),
        (6, 3, 4),
    ),
    "addmm": (
        lambda: Call(lambda m, x: torch.addmm(m.b, spectrum(x), m.w), w=normal(3, 2), b=normal(2)),
        (6, 4),
    ),
    "einsum": (
        lambda: Call(lambda m, x: torch.einsum("bi,io->bo", spectrum(x), m.w), w=normal(3, 2)),
        (6, 4),
    ),
    "einsum of three": (
        lambda: Call(
            lambda m, x: torch.einsum("bi,bj,ijo->bo", spectrum(x), spectrum(x.flip(1)), m.w),
            w=normal(3, 3, 2),
        ),
        (6, 4),
    ),
    "spectral convolution": (lambda: Call(spectral_convolution, w=normal(2, 3, 3)), (6, 2, 7)),
    "state space": (lambda: Call(state_space, a=pairs(5), b=pairs(5), w=normal(5, 2)), (6, 4)),
    "view_as_complex": (
        lambda: Call(lambda m, x: spectrum(x) @ torch.view_as_complex(m.w), w=pairs(3, 3, 2)),
        (6, 4),
    ),
    "view_as_complex, by letters": (
        lambda: Call(
            lambda m, x: torch.einsum("bi,io->bo", spectrum(x), torch.view_as_complex(m.w)),
            w=pairs(3, 3, 2),
        ),
        (6, 4),
    ),
    "torch.complex": (
        lambda: Call(
            lambda m, x: spectrum(x) @ torch.complex(m.a, m.b), a=pairs(3, 3), b=pairs(3, 3)
        ),
        (6, 4),
    ),
    "torch.polar": (
        lambda: Call(
            lambda m, x: spectrum(x) @ torch.polar(m.a.abs(), m.b), a=pairs(3, 3), b=pairs(3, 3)
        ),
        (6, 4),
    ),
    "torch.polar, element by element": (
        lambda: Call(
            lambda m, x: spectrum(x) * torch.polar(m.a.abs(), m.b), a=pairs(3), b=pairs(3)
        ),
        (6, 4),
    ),
    "conv1d": (
        lambda: Call(lambda m, x: m.c(torch.fft.fft(x)), c=nn.Conv1d(2, 3, 3, dtype=COMPLEX)),
        (6, 2, 7),
    ),
    "conv2d": (
        lambda: Call(
            lambda m, x: m.c(torch.fft.fft(x)), c=nn.Conv2d(2, 3, 3, padding=1, dtype=COMPLEX)
        ),
        (6, 2, 4, 4),
    ),
    "transposed": (
        lambda: Call(
            lambda m, x: m.c(torch.fft.fft(x)), c=nn.ConvTranspose1d(2, 3, 3, dtype=COMPLEX)
        ),
        (6, 2, 7),
    ),
    "scale and shift": (
        lambda: Call(lambda m, x: spectrum(x) * m.w + m.b, w=normal(3), b=normal(3)),
        (6, 4),
    ),
    "real scale and shift": (
        lambda: Call(lambda m, x: spectrum(x) * m.w + m.b, w=pairs(3), b=pairs(3)),
        (6, 4),
    ),
    "a conjugate": (
        lambda: Call(lambda m, x: spectrum(x) @ m.w.conj(), w=normal(3, 3)),
        (6, 4),
    ),
    "an adjoint": (lambda: Call(lambda m, x: spectrum(x) @ m.w.mH, w=normal(3, 3)), (6, 4)),
    "conjugate inputs": (
        lambda: Call(lambda m, x: spectrum(x).conj() @ m.w, w=normal(3, 3)),
        (6, 4),
    ),
    "real and imaginary parts": (
        lambda: Call(lambda m, x: torch.cat([x @ m.w.real, x @ m.w.imag], 1), w=normal(4, 3)),
        (6, 4),
    ),
    "a modulus": (lambda: Call(lambda m, x: (spectrum(x) * m.w).abs(), w=normal(3)), (6, 4)),
}


def setting(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    build, shape = CASES[name]
    return build(), (pairs(*shape),)


@pytest.mark.parametrize("name", CASES)
def test_complex_parameters_have_the_figures_of_each_example_alone(name):
    assert_as_one_at_a_time(*setting(name))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("others", [{}, {"alignment": True}])
def test_so_they_have_where_no_whole_gradients_are_kept(name, others):
    model, batch = setting(name)
    truth = one_at_a_time(model, batch)
    gradient = ab.batch_gradient(
        model,
        ab.Objective(values, reduction=ab.Sum()),
        batch,
        observe=ab.Observe(parameter_norms=True, **others),
    )
    squares = {n: norms.square() for n, norms in gradient.ledger.parameter_norms.items()}
    total = {n: g.sum(0) for n, g in truth.gradients.items()}
    sums = {n: real(p.grad.clone()) for n, p in trainable(model).items()}
    inner = truth.inner
    if others:
        inner = sum(g.flatten(1) @ total[n].flatten() for n, g in truth.gradients.items())
    expected = truth._replace(total=total, inner=inner)
    alignment = gradient.ledger.alignment if others else truth.inner
    rest = expected._replace(squares=squares, total=sums, inner=alignment)
    assert worst(rest, expected) < BOUND[torch.float64]


def test_the_conjugate_has_the_right_norms_and_is_far_away():
    model, batch = setting("matmul")
    truth, figures = one_at_a_time(model, batch), observe_figures(model, batch)
    wrong = {n: g * g.new_tensor([1, -1]) for n, g in figures.total.items()}
    assert worst(figures, truth) < BOUND[torch.float64]
    assert worst(figures._replace(total=wrong), truth) > 0.1


def forget_conjugate(saved: Tensor, d: Tensor) -> Tensor:
    return saved.to(d.dtype)


@pytest.mark.parametrize("name", ["matmul", "einsum", "view_as_complex", "an adjoint"])
def test_a_conjugate_that_is_forgotten_is_found_by_the_check(name, monkeypatch, caplog):
    """Check the sums: the squared norms are right even so, for rows of one."""
    for module in (calls, einsum):
        monkeypatch.setattr(module, "as_factor", forget_conjugate)
    model, batch = setting(name)
    assert worst(observe_figures(model, batch), one_at_a_time(model, batch)) < BOUND[torch.float64]
    assert "finds another gradient of w for a few examples than plain" in caplog.text


def negate(total: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, c: -total(self, c)


def reverse_rows(total: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, c: total(self, None if c is None else c.flip(0))


def shrink(total: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, c: 0.999 * total(self, c)


@pytest.mark.parametrize("mistake", [negate, reverse_rows, shrink])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_sum_with_right_norms_is_found_by_the_check(mistake, dtype, monkeypatch, caplog):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(dtype), torch.randn(6, 4, dtype=dtype)
    observe = ab.Observe()
    ab.batch_gradient(model, ab.Objective(values), (x,), observe=observe)
    monkeypatch.setattr(Product, "sum_gradients", mistake(Product.sum_gradients))
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(dtype)
    ab.batch_gradient(fresh, ab.Objective(values), (x,), observe=observe)
    assert "finds another gradient of 0.weight" in caplog.text


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_and_shares_of_complex_gradients(name):
    model, batch = setting(name)
    truth = one_at_a_time(model, batch)
    norms = torch.stack(list(truth.squares.values())).sum(0).sqrt()
    limit = float(norms.median())
    gradient = ab.batch_gradient(
        model, ab.Objective(values), batch, observe=ab.Observe(share=True, noise_scale=True)
    )
    assert float(gradient.ledger.share.sum()) == pytest.approx(1, abs=1e-9)
    ab.batch_gradient(model, ab.Objective(values), batch, clip=ab.ClipExamples(limit))
    factors = (limit / norms).clamp(max=1) / len(norms)
    for n, p in trainable(model).items():
        expected = torch.tensordot(factors, truth.gradients[n], 1)
        assert float((real(p.grad) - expected).norm()) < 1e-9 * float(norms.mean())


@pytest.mark.parametrize("name", ["matmul", "view_as_complex", "a conjugate", "a modulus"])
def test_a_penalty_on_the_gradient_of_a_complex_model(name):
    def penalise(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        score = model(x).flatten(1).sin().sum(1)
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return score + gradient.flatten(1).square().sum(1)

    assert_as_one_at_a_time(*setting(name), penalise)
