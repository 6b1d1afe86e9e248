"""Losses against their formulas in NumPy, and costs that the course's forum published."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch import zoo
from anybatch.batch import Padded
from anybatch.errors import LossError
from anybatch.zoo.losses import token_cross_entropy


def by_hand(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """sum_k -y_k log s_k - (1 - y_k) log(1 - s_k) of each example."""
    y = np.eye(logits.shape[1])[targets]
    s = 1 / (1 + np.exp(-logits))
    return (-y * np.log(s) - (1 - y) * np.log(1 - s)).sum(1)


def test_sigmoid_cross_entropy_sums_a_yes_or_no_question_for_each_class() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4))
    targets = np.array([0, 3, 1, 1, 2, 0])
    batch = torch.from_numpy(logits), torch.from_numpy(targets)
    result = zoo.sigmoid_cross_entropy(nn.Identity(), batch)
    np.testing.assert_allclose(result.values, by_hand(logits, targets), rtol=1e-13)  # float64
    assert result.metrics["accuracy"].tolist() == (logits.argmax(1) == targets).tolist()
    softmax = zoo.cross_entropy(nn.Identity(), batch)  # control: the other cross-entropy
    assert not np.allclose(softmax.values, by_hand(logits, targets), rtol=0.1)


def test_it_stays_finite_where_a_sigmoid_rounds_to_0_or_1() -> None:
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]])
    result = zoo.sigmoid_cross_entropy(nn.Identity(), (logits, torch.tensor([0, 1])))
    assert result.values.tolist() == [0.0, 400.0]
    with np.errstate(all="ignore"):  # control: the formula as written is not
        assert not np.isfinite(by_hand(logits.numpy(), np.array([0, 1]))).all()


def example_of_the_course(strength: float, on: str | None = None) -> float:
    """Compute the cost of the forum's test case: three examples, 2-2-4 units."""
    model = zoo.sigmoid_mlp([2], 2, 4).double()
    theta = np.arange(1, 19) / 10
    layers = theta[:6].reshape(2, 3, order="F"), theta[6:].reshape(4, 3, order="F")
    for layer, values in zip((model[1], model[3]), layers, strict=True):
        layer.bias.data = torch.from_numpy(values[:, 0].copy())  # the first column
        layer.weight.data = torch.from_numpy(values[:, 1:].copy())
    inputs = torch.arange(1, 7, dtype=torch.float64).reshape(3, 2).cos()
    targets = torch.tensor([4, 2, 3]) - 1  # the course counts classes from 1
    objective = ab.Objective(zoo.sigmoid_cross_entropy, penalty=ab.L2(strength, on=on))
    return ab.batch_gradient(model, objective, (inputs, targets)).loss.item()


def test_costs_of_the_course_come_out_with_l2_of_lambda_by_m() -> None:
    # published to five digits, for lambda 0, 3 and 4; m = 3
    assert example_of_the_course(0.0) == pytest.approx(7.4070, abs=5e-5)
    assert example_of_the_course(3 / 3) == pytest.approx(16.457, abs=5e-4)
    assert example_of_the_course(4 / 3) == pytest.approx(19.474, abs=5e-4)
    assert abs(example_of_the_course(3 / 3, on="*") - 16.457) > 1  # control: on biases too
    assert abs(example_of_the_course(3 / (2 * 3)) - 16.457) > 1  # control: halved twice


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"shape \(3,\)\. Expected \(batch, classes\)"),
        (torch.zeros(3, 2), torch.zeros(3), r"torch.float32 .* Expected integer classes of"),
        (
            torch.zeros(3, 2),
            torch.zeros(3, 2).long(),
            r"int64 and shape \(3, 2\)\. .* Are they one-hot",
        ),
    ],
)
def test_it_refuses_what_does_not_fit(
    logits: torch.Tensor, targets: torch.Tensor, message: str
) -> None:
    with pytest.raises(LossError, match=message):
        zoo.sigmoid_cross_entropy(nn.Identity(), (logits, targets))


def minus_log_p(logits: np.ndarray, target: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[target])


def make_ragged_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [3, 4, 5], targets of which one does not count, and a mask."""
    sample = np.random.default_rng(1)
    logits, targets = sample.normal(size=(3, 4, 5)), sample.integers(0, 5, (3, 4))
    targets[0, 1] = -100
    mask = np.arange(4) < np.array([4, 1, 3])[:, None]
    return torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(mask)


class Logits(nn.Module):
    """Inputs themselves, of `Padded` ones the values."""

    def forward(self, inputs: torch.Tensor | Padded) -> torch.Tensor:
        return inputs.values if isinstance(inputs, Padded) else inputs


def test_token_cross_entropy_sums_over_the_tokens_that_count() -> None:
    logits, targets, mask = make_ragged_tokens()
    result = token_cross_entropy(Logits(), (Padded(logits, mask), targets))
    rows = [[t for t in range(4) if mask[i, t] and targets[i, t] != -100] for i in range(3)]
    x, y = logits.numpy(), targets.numpy()
    values = [sum(minus_log_p(x[i, t], y[i, t]) for t in row) for i, row in enumerate(rows)]
    np.testing.assert_allclose(result.values, values, rtol=1e-13)  # float64
    assert result.counts is not None
    assert result.counts.tolist() == [len(row) for row in rows] == [3, 1, 3]
    hits = [sum(x[i, t].argmax() == y[i, t] for t in row) for i, row in enumerate(rows)]
    assert result.metrics["accuracy"].tolist() == hits
    unmasked = token_cross_entropy(Logits(), (logits, targets))  # control
    assert unmasked.counts is not None
    assert unmasked.counts.tolist() == [3, 4, 4]
    assert not np.allclose(unmasked.values, values, rtol=0.1)


BATCHES = {
    "cross_entropy": (zoo.cross_entropy, torch.tensor([0, 2, 1, 1])),
    "sigmoid_cross_entropy": (zoo.sigmoid_cross_entropy, torch.tensor([0, 2, 1, 1])),
    "squared_error": (zoo.squared_error, torch.linspace(-1, 1, 12).double().reshape(4, 3)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_mean_with_sample_weights_is_the_weighted_mean(name: str) -> None:
    """Oracle: plain autograd on sum w l / sum w; 1e-12 in float64, but for the order of sums."""
    loss, targets = BATCHES[name]
    torch.manual_seed(0)
    model, weights = nn.Linear(5, 3).double(), torch.tensor([0.5, 0.0, 2.0, 1.5]).double()
    inputs = torch.randn(4, 5).double()
    for cuts in (None, 1, (2, 2)):
        layout = ab.Layout(micro_batch=cuts)
        gradient = ab.batch_gradient(
            model, ab.Objective(loss), (inputs, targets, weights), layout=layout
        )
        result = model.weight.grad.clone()
        each = loss(model, (inputs, targets)).values
        mean = (weights * each).sum() / weights.sum()
        (wanted,) = torch.autograd.grad(mean, model.weight, retain_graph=True)
        (unweighted,) = torch.autograd.grad(each.mean(), model.weight)
        assert (result - wanted).norm() < 1e-12 * wanted.norm()
        assert gradient.loss.item() == pytest.approx(mean.item(), rel=1e-12)
        assert (result - unweighted).norm() > 0.1 * wanted.norm()  # control
    for metric, value in gradient.metrics.items():
        hits = loss(model, (inputs, targets)).metrics[metric]
        assert value.item() == pytest.approx((weights * hits).sum().item() / 4.0)


def test_weights_and_counts_of_tokens_multiply() -> None:
    logits, targets, mask = make_ragged_tokens()
    plain = token_cross_entropy(Logits(), (Padded(logits, mask), targets))
    weights = torch.tensor([2.0, 0.5, 0.0])
    result = token_cross_entropy(Logits(), (Padded(logits, mask), targets, weights))
    assert result.counts is not None
    assert result.counts.tolist() == [6, 0.5, 0]
    assert result.values.tolist() == (plain.values * weights).tolist()
    hits = plain.metrics["accuracy"] * weights
    assert result.metrics["accuracy"].tolist() == hits.tolist()


def test_squared_error_takes_one_number_an_example_with_and_without_a_column_of_one() -> None:
    targets = torch.tensor([1.0, 2.0, 4.0])
    for predictions in (torch.zeros(3, 1), torch.zeros(3)):
        result = zoo.squared_error(nn.Identity(), (predictions, targets))
        assert result.values.tolist() == [1, 4, 16]
    column = zoo.squared_error(nn.Identity(), (torch.zeros(3, 1), targets[:, None]))
    assert column.values.tolist() == [1, 4, 16]
    for predictions in (torch.zeros(3, 3), torch.zeros(1, 1), torch.zeros(3, 1, 1)):
        with pytest.raises(LossError, match=r"and targets of shape .* Expected equal shapes"):
            zoo.squared_error(nn.Identity(), (predictions, targets))  # never broadcast


@pytest.mark.parametrize("loss", [*(loss for loss, _ in BATCHES.values()), token_cross_entropy])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 2), r"a batch of Tensor. Expected \(inputs, targets\) or"),
        ((torch.zeros(3, 2),), "got a batch of 1 things"),
        ((torch.zeros(3, 2),) * 4, "got a batch of 4 things"),
        (
            (torch.zeros(3, 2), torch.zeros(3).long(), torch.ones(3, 1)),
            r"weights of shape \(3, 1\). Expected one for each example: \(3,\)",
        ),
    ],
)
def test_batches_of_another_form_are_refused(loss: Any, batch: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        loss(nn.Identity(), batch)


def test_tokens_and_classes_are_not_mixed_up() -> None:
    logits = torch.zeros(3, 4, 5)
    with pytest.raises(LossError, match="For one class for each token use"):
        zoo.cross_entropy(nn.Identity(), (logits, torch.zeros(3, 4).long()))
    with pytest.raises(LossError, match=r"\(3, 4, 5\) and targets of shape \(3,\)"):
        token_cross_entropy(nn.Identity(), (logits, torch.zeros(3).long()))


def test_negative_weights_are_refused_in_a_batch_too() -> None:
    model = nn.Linear(2, 3)
    batch = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1.0, -1.0])
    with pytest.raises(LossError, match="-1"):
        ab.batch_gradient(model, ab.Objective(zoo.cross_entropy), batch)
