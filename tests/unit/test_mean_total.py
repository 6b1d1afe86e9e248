"""Mean with a total: weights keep their effect at every batch size.

Oracle: weighted least squares in NumPy, float64, with sums over all data alone. Tolerance: 1e-12,
for sums in another order. Control: Mean() without a total fades to the mean without weights.
"""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import LossError, RecipeError
from anybatch.recipe.scaling.convert import convert
from anybatch.recipe.schema import Recipe

N = 24
RNG = np.random.default_rng(0)
Y = RNG.normal(size=N)
W = np.where(np.arange(N) % 6 == 0, 0.0, RNG.gamma(0.7, size=N)) * (1 + (Y > 0))
TOTAL = float(W.mean())
BY_WEIGHT, PLAIN = float((W * Y).sum() / W.sum()), float(Y.mean())


def losses(model, batch):
    """(1/2) w (b - y)^2 of each example, and its weight."""
    y, w = batch
    return ab.ExampleLosses(0.5 * w * (model(y[:, None])[:, 0] - y) ** 2, counts=w)


def name_losses(model, batch):
    return {"near": losses(model, batch)}


class Level(nn.Module):
    """A constant."""

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.b.expand(len(x), 1)


def batch(ids):
    return torch.tensor(Y)[ids], torch.tensor(W)[ids]


def solve(size, reduction, micro_batch=None, example_losses=losses):
    """Return the level at which the mean gradient over all batches is 0: it is linear in b."""
    slopes = []
    for level in (0.0, 1.0):
        total = 0.0
        for start in range(0, N, size):
            model = Level()
            nn.init.constant_(model.b, level)
            objective = ab.Objective(example_losses, reduction)
            ids = torch.arange(start, start + size)
            ab.batch_gradient(model, objective, batch(ids), layout=ab.Layout(micro_batch))
            total += float(model.b.grad)
        slopes.append(total)
    return slopes[0] / (slopes[0] - slopes[1])


@pytest.mark.fast(3)
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("size", [N, 12, 8, 3, 2, 1])
def test_the_weighted_mean_does_not_depend_on_the_batch_size(size, micro_batch):
    for reduction in (ab.Mean(total=TOTAL), 0.5 * ab.Mean(total=TOTAL)):
        assert solve(size, reduction, micro_batch) == pytest.approx(BY_WEIGHT, rel=1e-12)
    result = solve(size, {"near": ab.Mean(total=TOTAL)}, micro_batch, name_losses)
    assert result == pytest.approx(BY_WEIGHT, rel=1e-12)


def test_without_a_total_it_fades_to_the_mean_without_weights():  # the control
    assert solve(N, ab.Mean()) == pytest.approx(BY_WEIGHT, rel=1e-12)
    present = np.flatnonzero(W)
    away = [abs(solve_present(size, present) - BY_WEIGHT) for size in (20, 4, 2, 1)]
    assert away[0] < 1e-12 < away[1] < away[3]
    assert solve_present(1, present) == pytest.approx(Y[present].mean(), rel=1e-12)


def solve_present(size, present):
    """`solve` with Mean(), over the examples that have a weight."""
    slopes = [0.0, 0.0]
    for level in (0, 1):
        for start in range(0, len(present), size):
            model = Level()
            nn.init.constant_(model.b, float(level))
            ids = torch.tensor(present[start : start + size])
            ab.batch_gradient(model, ab.Objective(losses), batch(ids))
            slopes[level] += float(model.b.grad)
    return slopes[0] / (slopes[0] - slopes[1])


@pytest.mark.parametrize("micro_batch", [None, 5, 2])
def test_value_coefficients_and_norms_are_those_of_the_equation(micro_batch):
    model = Level()
    gradient = ab.batch_gradient(
        model,
        ab.Objective(losses, 2 * ab.Mean(total=0.8)),
        batch(torch.arange(7)),
        layout=ab.Layout(micro_batch),
        observe=ab.Observe(norms=True, share=True),
    )
    c = np.where(W[:7] > 0, 2 / (7 * 0.8), 0)
    assert gradient.loss.item() == pytest.approx((c * 0.5 * W[:7] * Y[:7] ** 2).sum(), rel=1e-12)
    assert gradient.coefficients.numpy() == pytest.approx(c, rel=1e-12)
    assert model.b.grad.item() == pytest.approx((c * W[:7] * -Y[:7]).sum(), rel=1e-12)
    norms = np.where(W[:7] > 0, abs(Y[:7]), 0)
    assert gradient.ledger.norms.numpy() == pytest.approx(norms, rel=1e-12)
    assert gradient.ledger.share.sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_batch_of_weight_0_changes_nothing(micro_batch):
    ids, model = torch.tensor([0, 6]), Level()
    how = {"layout": ab.Layout(micro_batch)}
    objective = ab.Objective(losses, 0.5 * ab.Mean(total=TOTAL))
    gradient = ab.batch_gradient(model, objective, batch(ids), **how)
    assert gradient.loss.item() == model.b.grad.item() == 0
    with pytest.raises(LossError, match="All counts of the batch are 0"):  # the control
        ab.batch_gradient(model, ab.Objective(losses), batch(ids), **how)


def train(size, reduction, folder=None, weights=W):
    model = Level()
    for step in ab.steps(
        model,
        ab.Objective(losses, reduction),
        torch.optim.SGD(model.parameters(), lr=0.01),
        (torch.tensor(Y), torch.tensor(weights)),
        order=ab.Order(N, batch_size=size, seed=0),
        epochs=2,
        run=folder,
    ):
        assert np.isfinite(step.loss)
    return float(model.b.detach())


@pytest.mark.parametrize("size", [1, 5, 7])
def test_steps_are_those_of_the_equation_with_a_short_last_batch(size, tmp_path):
    order, b = ab.Order(N, batch_size=size, seed=0), 0.0
    for t in range(order.num_steps(2)):
        ids = order.indices(t).numpy()
        b -= 0.01 * (W[ids] * (b - Y[ids])).sum() / (len(ids) * TOTAL)
    assert train(size, ab.Mean(total=TOTAL), tmp_path) == pytest.approx(b, rel=1e-12)


def test_small_batches_of_varying_weights_are_warned_of_once(caplog):
    with caplog.at_level(logging.WARNING, "anybatch"):
        train(2, ab.Mean(total=TOTAL))
        assert not caplog.records
        train(12, 0.5 * ab.Mean(total=TOTAL))
        assert not caplog.records
        train(3, 0.5 * ab.Mean(), weights=W + 0.01)
    (row,) = caplog.records
    assert "Use ab.Mean(total=weights.mean().item())" in row.getMessage()


@pytest.mark.parametrize("total", [0, -1.0, float("nan"), float("inf"), True, "1", torch.ones(())])
def test_a_total_that_is_no_number_is_refused(total):
    with pytest.raises(LossError, match="It must be a finite number above 0"):
        ab.Mean(total=total)


def recipe(reduction):
    return Recipe.model_validate(
        {
            "data": {"name": "digits", "args": {"weights": "w.npy"}},
            "model": {"name": "mlp"},
            "objective": {"loss": "cross_entropy", "reduction": reduction},
            "optimizer": {"name": "sgd", "lr": 0.3},
            "order": {},
            "batch": {"size": 10},
            "run": {"epochs": 1},
        }
    )


def test_a_total_makes_the_conversion_to_a_sum_exact_for_weights_too():
    done = convert(recipe({"name": "mean", "total": 1.5, "scale": 2.0}), "sum").recipe
    assert done.objective.reduction == {"name": "sum", "scale": 2.0}
    assert done.optimizer.lr == pytest.approx(0.3 / 15)
    assert (
        convert(recipe({"name": "mean", "total": 1.5}), "sum").recipe.objective.reduction == "sum"
    )
    with pytest.raises(RecipeError, match="weights of a batch add up to another sum"):
        convert(recipe("mean"), "sum")  # the control
