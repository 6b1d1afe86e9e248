"""Ledger of the user's own loop: `with ab.observe(model)`.

Oracle: torch.autograd.grad of each example's part of the loss, in float64; 1e-10 as the norm of the
difference over the norm, since products are added up in another order.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger.noise import noise_estimate

BOUND = 1e-10
Y = torch.arange(12) % 3


class TimeFirst(nn.Module):
    """Sequences [B, T, 4], which its layers see as [T, B, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x.transpose(0, 1)))).mean(0)


def setting(steps: int = 5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return TimeFirst().double(), torch.rand(12, steps, 4, dtype=torch.float64)


def parts(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the part of each example in the gradient of the mean loss: [B, all parameters]."""
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            for loss in (F.cross_entropy(model(x[i, None]), Y[i, None]) / 12 for i in range(12))
        ]
    )


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("steps", [5, 12])  # 12: as many as examples
def test_a_loop_of_ones_own_sees_what_each_example_adds(steps):
    model, x = setting(steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with ab.observe(model) as ledger:
        for _ in range(3):
            expected = parts(copy.deepcopy(model), x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), Y).backward()
            assert distance(ledger.norms, expected.norm(dim=1)) < BOUND
            total = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert distance(total, expected.sum(0)) < BOUND
            optimizer.step()
    assert distance(ledger.norms, expected.sum(0).norm().expand(12)) > 0.1  # the control


def test_gradients_are_added_to_what_is_there_as_backward_does():
    model, x = setting()
    with ab.observe(model):
        for half in (slice(0, 6), slice(6, 12)):
            F.cross_entropy(model(x[half]), Y[half], reduction="sum").backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(total, 12 * parts(model, x).sum(0)) < BOUND


def test_norms_by_parameter_are_those_of_the_whole():
    model, x = setting()
    with ab.observe(model) as ledger:
        F.cross_entropy(model(x), Y).backward()
    assert set(ledger.parameter_norms) == {name for name, _ in model.named_parameters()}
    whole = torch.stack(list(ledger.parameter_norms.values())).norm(dim=0)
    assert distance(whole, ledger.norms) < BOUND


def test_outside_of_the_context_the_model_is_as_before():
    model, x = setting()
    with ab.observe(model):
        F.cross_entropy(model(x), Y).backward()
    model.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(total, parts(model, x).sum(0)) < BOUND
    assert not model._forward_pre_hooks


def test_nothing_observed_is_said_so():
    model, x = setting()
    loss = F.cross_entropy(model(x), Y)
    with ab.observe(model) as ledger:
        with pytest.raises(LedgerError, match="Was the forward pass before it"):
            _ = ledger.norms
        with pytest.raises(LedgerError, match="past the ledger"):
            loss.backward()  # its forward pass was not seen


def test_the_noise_scale_of_an_update_is_that_of_its_examples():
    model, x = setting()

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    gradients = 12 * parts(model, x)
    mean = gradients.mean(0)
    square = float(mean.square().sum())
    expected = noise_estimate(gradients.square().sum(1), gradients @ mean, None, square).scale()
    for reduction in (ab.Mean(), ab.Sum(), 0.5 * ab.Mean()):
        for micro_batch in (None, 5):
            gradient = ab.batch_gradient(
                model,
                ab.Objective(losses, reduction=reduction, penalty=ab.L2(0.1)),
                (x, Y),
                layout=ab.Layout(micro_batch),
                observe=ab.Observe(noise_scale=True),
            )
            scale = gradient.ledger.noise_scale
            assert scale.low == pytest.approx(expected.low, rel=1e-6)
            assert scale.value == pytest.approx(expected.value, rel=1e-6, nan_ok=True)
            assert scale.examples == 12
    with pytest.raises(LedgerError, match="needs one term under Mean or Sum"):
        ab.batch_gradient(
            model,
            ab.Objective(losses, reduction=ab.Max()),
            (x, Y),
            observe=ab.Observe(noise_scale=True),
        )


@pytest.mark.parametrize("micro_batch", [None, 48])
def test_noise_alone_takes_the_inner_products_of_some_examples(micro_batch):
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), (torch.randn(256, 5), torch.randint(3, (256,)))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def estimate(**others: bool):
        observe = ab.Observe(noise_scale=True, **others)
        layout = ab.Layout(micro_batch)
        return ab.batch_gradient(
            model, ab.Objective(losses), batch, layout=layout, observe=observe
        ).ledger.noise

    some, whole = estimate(), estimate(alignment=True)
    assert (some.degrees, whole.degrees) == (64, 256)
    assert some.variance == pytest.approx(whole.variance, rel=1e-5)
    assert some.gradient_square == pytest.approx(whole.gradient_square, rel=1e-5)
    assert some.var_h == pytest.approx(whole.var_h, rel=0.5)
    assert some.var_h != whole.var_h


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), ()])
def test_a_parameter_of_any_shape_has_its_part_in_the_share(shape):
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), (torch.randn(8, 5), torch.randint(3, (8,)))
    model.extra = nn.Parameter(torch.randn(shape))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        values = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return values + (1 + batch[0][:, 0]) * model.extra.sum()

    gradient = ab.batch_gradient(model, ab.Objective(losses), batch, observe=ab.Observe(share=True))
    assert gradient.ledger.share.sum().item() == pytest.approx(1, rel=1e-5)


def test_unequal_counts_take_every_inner_product():
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3), (torch.randn(256, 5), torch.randint(3, (256,)))
    counts = torch.randint(1, 4, (256,))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ab.ExampleLosses:
        values = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return ab.ExampleLosses(values * counts, counts=counts)

    def estimate(**others: bool):
        observe = ab.Observe(noise_scale=True, **others)
        return ab.batch_gradient(model, ab.Objective(losses), batch, observe=observe).ledger.noise

    assert estimate() == estimate(share=True)


def test_examples_that_are_alike_have_no_noise():
    ones = torch.full((2,), 0.1)
    scale = noise_estimate(ones, ones * (1 + 1e-7), None, 0.1).scale()  # off by rounding
    assert scale.value >= 0
    assert scale.value < 1e-5
