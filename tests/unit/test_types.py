"""Complex and mixed types of weights, and every default type of torch.

Oracles: formulas by hand in NumPy complex128, and plain autograd over the whole batch or one
example at a time in the loops that a user would write.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anybatch as ab
from anybatch.gradient.clip import compute_norm
from anybatch.report.evidence import collect_evidence, norm

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


class Mixed(nn.Module):
    """A spectral layer of complex64, complex128 and float32 before a layer of float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.float32))
        self.head = nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x):
        h = torch.fft.rfft(x) @ self.w * self.scale + self.bias
        return self.head(torch.view_as_real(h).flatten(1))


class Spectral(nn.Module):
    """Complex weights alone, one of them 0, one used by its conjugate."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.v = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.w.data[0, 0] = 0

    def forward(self, x):
        return torch.view_as_real(
            torch.fft.rfft(x) @ self.w + torch.fft.rfft(x.square()) @ self.v.conj()
        ).flatten(1)


class Wide(nn.Module):
    """Weights of float32 and float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.a = nn.Linear(4, 3, dtype=torch.float32)
        self.b = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x):
        return self.b(self.a(x).tanh().double())


MODELS = [Mixed, Spectral, Wide]


def losses(model, batch):
    return model(batch).sin().sum(1)


def inputs(examples=8):
    return torch.randn(examples, 4, generator=torch.Generator().manual_seed(3))


def plain(model, penalty=lambda p: 0.0):
    """Gradients of the mean loss and a penalty of each weight, by autograd."""
    loss = losses(model, inputs()).mean() + sum(penalty(p) for p in model.parameters())
    return [g.resolve_conj() for g in torch.autograd.grad(loss, list(model.parameters()))]


def distance(model, gradients):
    """Largest relative difference of a parameter's gradient."""
    pairs = zip(model.parameters(), gradients, strict=True)
    return max(float((p.grad - g).norm() / g.norm()) for p, g in pairs)


def moduli(model):
    return [p.detach().numpy().astype(np.complex128) for p in model.parameters()]


# ------------------------------------------------------------------------------- complex weights


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_penalties_of_complex_weights_are_those_of_their_moduli(make, micro_batch):
    model = make()
    layout = ab.Layout(micro_batch=micro_batch)
    penalty = ab.L2(0.3, on="*") + ab.L1(0.2, on="*")
    result = ab.batch_gradient(
        model, ab.Objective(losses, penalty=penalty), inputs(), layout=layout
    )
    without = plain(model)
    weights = moduli(model)
    for p, g, w in zip(model.parameters(), without, weights, strict=True):
        size = np.abs(w)
        unit = np.divide(w, size, out=np.zeros_like(w), where=size > 0)
        expected = g.numpy() + 0.3 * w + 0.2 * unit
        # The coarsest weight is float32: a few of its roundings, 6e-8 each.
        assert np.abs(p.grad.numpy() - expected).max() < 1e-6 * np.abs(expected).max()
        # The control: signs of the real part, as `sign` would mean for a real weight.
        if np.iscomplexobj(p.detach().numpy()):
            wrong = g.numpy() + 0.3 * w + 0.2 * np.sign(w.real)
            assert np.abs(p.grad.numpy() - wrong).max() > 0.01
    squares = sum((np.abs(w) ** 2).sum() for w in weights)
    assert float(result.parts["L2(*)"]) == pytest.approx(0.15 * squares, rel=1e-6)
    assert float(result.parts["L1(*)"]) == pytest.approx(
        0.2 * sum(np.abs(w).sum() for w in weights), rel=1e-6
    )
    assert not result.loss.is_complex()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("micro_batch", [None, 3, [1, 5, 2]])
@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Tilted(1.0)], ids=["mean", "tilted"])
def test_gradients_of_complex_and_mixed_weights_are_those_of_autograd(make, micro_batch, reduction):
    model = make()
    objective = ab.Objective(losses, reduction=reduction)
    ab.batch_gradient(model, objective, inputs(), layout=ab.Layout(micro_batch=micro_batch))
    values = losses(model, inputs())
    loss = values.mean() if isinstance(reduction, ab.Mean) else values.exp().mean().log()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert distance(model, expected) < 1e-5  # float32, as promised for any layout
    assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
    wrong = [2 * g for g in expected[:1]] + list(expected[1:])
    assert distance(model, wrong) > 0.1  # the control


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_clipped_norm_is_that_of_all_moduli(make, micro_batch):
    model = make()
    layout = ab.Layout(micro_batch=micro_batch)
    result = ab.batch_gradient(
        model, ab.Objective(losses), inputs(), clip=ab.ClipNorm(0.01), layout=layout
    )
    gradients = plain(model)
    norm = np.sqrt(sum((np.abs(g.numpy()) ** 2).sum() for g in gradients))
    assert float(result.norm) == pytest.approx(norm, rel=1e-5)
    assert not result.norm.is_complex()
    assert distance(model, [g * (0.01 / norm) for g in gradients]) < 1e-5
    real = np.sqrt(sum((g.numpy().real ** 2).sum() for g in gradients))
    assert make is Wide or real < 0.995 * norm  # the control: real parts alone


def test_the_norm_of_nothing_and_of_conjugate_views():
    assert float(compute_norm([])) == 0
    assert float(compute_norm([torch.tensor([3 + 4j]).conj(), torch.tensor([12.0])])) == 13


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_and_averages_of_complex_weights_are_those_of_a_plain_loop(make, kind):
    model, other = make(), make()
    average = ab.Average(model, 0.5)
    averages = [p.detach().clone() for p in other.parameters()]
    order = ab.Order(8, batch_size=4, seed=0)
    optimizer, plain_optimizer = (kind(m.parameters(), lr=0.01) for m in (model, other))
    for step in ab.steps(model, ab.Objective(losses), optimizer, inputs(), order=order, epochs=3):
        average.update(model)
        plain_optimizer.zero_grad()
        losses(other, inputs()[order.indices(step.step)]).mean().backward()
        for p in other.parameters():
            p.grad = p.grad.resolve_conj()  # torch's own Adam cannot do without
        plain_optimizer.step()
        for mean, p in zip(averages, other.parameters(), strict=True):
            mean.mul_(0.5).add_(p.detach(), alpha=0.5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).norm() < 1e-4 * q.norm()  # Adam divides small gradients by small ones
    with average.swapped(model):
        for p, mean in zip(model.parameters(), averages, strict=True):
            assert (p - mean).norm() < 1e-4 * mean.norm()
        assert any(
            (p - q).norm() > 1e-3 * q.norm()
            for p, q in zip(model.parameters(), other.parameters(), strict=True)
        )


def test_complex_weights_are_taken_up_where_a_run_left_them(tmp_path):
    def train(epochs, run):
        model = Mixed()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        order = ab.Order(8, batch_size=4, seed=0)
        steps = ab.steps(
            model, ab.Objective(losses), optimizer, inputs(), order=order, epochs=epochs, run=run
        )
        return [step.loss for step in steps], [p.detach() for p in model.parameters()]

    whole, weights = train(4, tmp_path / "whole")
    first, before = train(2, tmp_path / "parts")
    second, after = train(4, tmp_path / "parts")
    assert first + second == whole
    assert all(torch.equal(a, b) for a, b in zip(after, weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))  # the control


def test_a_layout_that_changes_the_imaginary_part_alone_is_told():
    model = Spectral()

    def step(micro_batches, *, wrong):
        model.zero_grad()
        examples = sum(map(len, micro_batches))
        for batch in micro_batches:
            (losses(model, batch).sum() / examples).backward()
        if wrong:
            model.w.grad.imag.mul_(len(micro_batches))
        return model

    ab.assert_layout_invariant(lambda batch: step(batch, wrong=False), inputs())
    with pytest.raises(AssertionError, match="The gradient depends on the layout"):
        ab.assert_layout_invariant(lambda batch: step(batch, wrong=True), inputs())


@pytest.mark.parametrize("make", MODELS)
def test_the_page_of_an_update_shows_complex_weights_as_pairs(make):
    model, objective = make(), ab.Objective(losses, penalty=ab.L2(0.1, on="*"))
    result = collect_evidence(model, objective, inputs())
    weights = moduli(model)
    gradients = [g.numpy() + 0.1 * w for g, w in zip(plain(model), weights, strict=True)]
    for figures, expected in ((result.before, weights), (result.update, gradients)):
        length = np.sqrt(sum((np.abs(one) ** 2).sum() for one in expected))
        assert norm(figures) == pytest.approx(length, rel=1e-5)  # float32
        assert not any(tensor.is_complex() for tensor in figures.values())
        real = np.sqrt(sum((one.real**2).sum() for one in expected))
        assert make is Wide or real < 0.995 * length  # the control: real parts alone
    gradient = ab.batch_gradient(model, objective, inputs(), observe=ab.Observe(gradients=True))
    page = ab.explain(gradient, model=model, objective=objective, batch=inputs())
    assert "<html" in page.html


# ------------------------------------------------------------------------- narrow counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_counts_and_metrics_are_summed_in_float32(dtype):
    counts = (20_000 + 100 * torch.arange(12)).to(dtype)  # their sum is beyond float16

    def count_calls(model, batch):
        values = model(batch).sum(1).to(dtype)
        metrics = {"hits": torch.full((12,), 700.0, dtype=dtype)[: len(batch)]}
        return ab.ExampleLosses(values, counts[: len(batch)], metrics=metrics)

    model = nn.Linear(4, 2)
    result = ab.batch_gradient(model, ab.Objective(count_calls), inputs(12))
    exact = 12 * 700 / counts.double().sum().item()
    assert float(result.metrics["hits"]) == pytest.approx(exact, rel=1e-6)  # float32
    narrow = torch.full((12,), 700.0, dtype=dtype).sum() / counts.sum()
    assert float(narrow) != pytest.approx(exact, rel=1e-4)  # the control


# --------------------------------------------------------------------------------- default types


@pytest.fixture(params=DTYPES, ids=str)
def default(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def label():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float32)
    return x.to(torch.get_default_dtype()), torch.arange(12) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def by_hand(model, reduce):
    """Gradients in float64 of losses reduced by hand, L2 and L1 of the weight matrices added."""
    other = network().double()
    other.load_state_dict(model.state_dict())
    x, y = label()
    matrices = [p for p in other.parameters() if p.ndim == 2]
    loss = reduce(F.cross_entropy(other(x.double()), y, reduction="none"))
    loss = loss + sum(0.05 * p.square().sum() + 0.1 * p.abs().sum() for p in matrices)
    return torch.autograd.grad(loss, list(other.parameters()))


# Of the longest gradient, some ten roundings of the type; `evaluate` and `steps` need no more.
ROUNDING = {torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.01}
REDUCTIONS = {
    "mean": (ab.Mean(), torch.mean),
    "max": (ab.Max(), torch.max),
    "tilted": (ab.Tilted(1.0), lambda v: v.exp().mean().log()),
    "top": (ab.TopFraction(0.5), lambda v: v.topk(6).values.mean()),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_default_type_changes_no_gradient(default, reduction, micro_batch):
    model = network()
    ours, by = REDUCTIONS[reduction]
    objective = ab.Objective(cross_entropy, reduction=ours, penalty=ab.L2(0.1) + ab.L1(0.1))
    for how in ({}, {"bitwise": True, "layout": ab.Layout()}, {"clip": ab.ClipNorm(1e3)}):
        ab.batch_gradient(
            model, objective, label(), **{"layout": ab.Layout(micro_batch=micro_batch), **how}
        )
        expected = by_hand(model, by)
        longest = max(g.norm() for g in expected)
        for p, g in zip(model.parameters(), expected, strict=True):
            assert p.grad.dtype == default
            assert (p.grad.double() - g).norm() < ROUNDING[default] * longest
        assert any(
            (p.grad * 1.2 - g).norm() > 0.06 * longest
            for p, g in zip(model.parameters(), expected, strict=True)
        )


@pytest.mark.fast(3)
@pytest.mark.parametrize("how", ["observe", "clip", "auto", "grain norms"])
def test_a_default_type_stops_nothing(default, how):
    asked = {
        "observe": {"observe": ab.Observe(alignment=True, share=True, noise_scale=True)},
        "clip": {"clip": ab.ClipExamples(0.5)},
        "auto": {"layout": ab.Layout(micro_batch="auto")},
        "grain norms": {"observe": ab.Observe(norms=False, grain_norms=True), "bitwise": True},
    }[how]
    model = network()
    objective = ab.Objective(cross_entropy, grain=4)
    gradient = ab.batch_gradient(model, objective, label(), **asked)
    assert gradient.is_finite
    if how == "observe":
        norms = [
            torch.cat([g.flatten() for g in alone]).norm() for alone in each_example(model, label())
        ]
        # Per-example norms are at least float32, their gradients of the default type.
        assert torch.allclose(
            gradient.ledger.norms.double(), torch.stack(norms), rtol=4 * ROUNDING[default]
        )


def each_example(model, batch):
    other = network().double()
    other.load_state_dict(model.state_dict())
    for x, y in zip(batch[0].double(), batch[1], strict=True):
        yield torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_under_a_default_type_is_that_of_a_plain_loop(default, precision):
    model, other = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    order = ab.Order(12, batch_size=4, seed=0)
    x, y = label()
    for step in ab.steps(
        model,
        ab.Objective(cross_entropy),
        optimizers[0],
        (x, y),
        order=order,
        epochs=2,
        schedule=ab.WarmUp(ab.Cosine(0.1, 24), 8),
        precision=precision,
    ):
        ids = order.indices(step.step)
        optimizers[1].zero_grad()
        optimizers[1].param_groups[0]["lr"] = step.lr
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            cross_entropy(other, (x[ids], y[ids])).float().mean().backward()
        optimizers[1].step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p - q).norm() <= 4 * ROUNDING[default] * q.norm()
        assert (p - 1.5 * q).norm() > 4 * ROUNDING[default] * q.norm()  # the control
    result = ab.evaluate(model, ab.Objective(cross_entropy), (x, y))
    assert result.loss == pytest.approx(
        float(cross_entropy(model, (x, y)).detach().double().mean()), rel=ROUNDING[default]
    )
