"""The course's cross-entropy: its formula, and costs that its forum published."""

import numpy as np
import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch import zoo
from anybatch.errors import LossError


def by_hand(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """sum_k -y_k log s_k - (1 - y_k) log(1 - s_k) of each example."""
    y = np.eye(logits.shape[1])[targets]
    s = 1 / (1 + np.exp(-logits))
    return (-y * np.log(s) - (1 - y) * np.log(1 - s)).sum(1)


def test_sigmoid_cross_entropy_sums_a_yes_or_no_question_for_each_class() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4))
    targets = np.array([0, 3, 1, 1, 2, 0])
    batch = torch.from_numpy(logits), torch.from_numpy(targets)
    found = zoo.sigmoid_cross_entropy(nn.Identity(), batch)
    np.testing.assert_allclose(found.values, by_hand(logits, targets), rtol=1e-13)  # float64
    assert found.metrics["accuracy"].tolist() == (logits.argmax(1) == targets).tolist()
    softmax = zoo.cross_entropy(nn.Identity(), batch)  # control: the other cross-entropy
    assert not np.allclose(softmax.values, by_hand(logits, targets), rtol=0.1)


def test_it_stays_finite_where_a_sigmoid_rounds_to_0_or_1() -> None:
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]])
    found = zoo.sigmoid_cross_entropy(nn.Identity(), (logits, torch.tensor([0, 1])))
    assert found.values.tolist() == [0.0, 400.0]
    with np.errstate(all="ignore"):  # control: the formula as written is not
        assert not np.isfinite(by_hand(logits.numpy(), np.array([0, 1]))).all()


def example_of_the_course(strength: float, on: str | None = None) -> float:
    """The cost of the forum's test case: three examples, 2-2-4 units, parameters 0.1 ... 1.8."""
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
        (torch.zeros(3), torch.zeros(3).long(), r"shape \(batch, classes\), got \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3), r"integer classes of shape \(batch,\), got torch.fl"),
        (torch.zeros(3, 2), torch.zeros(3, 2).long(), r"int64 of shape \(3, 2\). Are they one-hot"),
    ],
)
def test_it_refuses_what_does_not_fit(
    logits: torch.Tensor, targets: torch.Tensor, message: str
) -> None:
    with pytest.raises(LossError, match=message):
        zoo.sigmoid_cross_entropy(nn.Identity(), (logits, targets))
