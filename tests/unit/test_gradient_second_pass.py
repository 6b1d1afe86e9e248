"""Second passes of reductions that are not linear: only examples with a coefficient take part.

Oracle: the gradient of the whole batch at once, in float64; the number of examples by a counter in
the model's forward pass.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.pytree import Uncollated

ROWS = torch.linspace(-2, 2, 20 * 3, dtype=torch.float64).sin().view(20, 3)


class Counting(nn.Module):
    """A layer that counts the examples which pass with a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(3, 1).double(), nn.Dropout(0.0)
        self.num_examples = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_examples += len(x) * torch.is_grad_enabled()
        return self.drop(self.layer(x))[:, 0]


def square_of_rows(model: nn.Module, batch: Any) -> Tensor:
    return model(torch.as_tensor(batch["x"]) if isinstance(batch, dict) else batch).square()


SHARES: dict[str, Any] = {
    "a tensor": ROWS,
    "a dict with an array": {"x": ROWS.numpy()},
    "a dict with what all share": {"x": ROWS, "scale": ab.Shared(torch.ones(3))},
    "a list to collate": Uncollated(list(ROWS), torch.stack),
}


@pytest.mark.parametrize(
    "reduction", [ab.TopFraction(0.1), ab.Max(), ab.TopFraction(0.33)], ids=str
)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("layout", [ab.Layout(3), ab.Layout((1, 7, 2, 10)), ab.Layout(1)], ids=str)
def test_a_second_pass_takes_only_examples_with_a_coefficient(reduction, share, layout):
    model, objective = Counting(), ab.Objective(square_of_rows, reduction)
    gradient = ab.batch_gradient(model, objective, SHARES[share], layout=layout, self_check=False)
    passed = model.num_examples
    bits = [p.grad.clone() for p in model.parameters()]
    ab.batch_gradient(model, objective, ROWS)
    for p, g in zip(model.parameters(), bits, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14)
    assert passed == int((gradient.coefficients != 0).sum())


@pytest.mark.parametrize(
    ("how", "share"),
    [
        ({"observe": ab.Observe()}, ROWS),
        ({"bitwise": True}, ROWS),
        ({"layout": None}, ab.MicroBatches([ROWS[:4], ROWS[4:]])),
        ({}, ROWS.clone().requires_grad_()),
    ],
    ids=["observed", "bitwise", "cut by the caller", "inputs with a gradient"],
)
def test_some_second_passes_take_whole_micro_batches(how, share):
    model = Counting()
    objective = ab.Objective(square_of_rows, ab.TopFraction(0.1), grain=4)
    how = {"layout": ab.Layout(4), "self_check": False} | how
    gradient = ab.batch_gradient(model, objective, share, **how)
    assert model.num_examples > int((gradient.coefficients != 0).sum())
    bits = [p.grad.clone() for p in model.parameters()]
    ab.batch_gradient(model, ab.Objective(square_of_rows, ab.TopFraction(0.1)), ROWS)
    for p, g in zip(model.parameters(), bits, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14)


def test_grains_of_a_model_that_draws_stay_whole():
    model = Counting()
    model.drop = nn.Dropout(0.5)
    objective = ab.Objective(square_of_rows, ab.TopFraction(0.1), grain=4)
    how = {"key": ab.Key(0, 0), "self_check": False}
    gradient = ab.batch_gradient(model, objective, ROWS, layout=ab.Layout(4), **how)
    needed = (gradient.coefficients != 0).view(5, 4).any(1)
    assert model.num_examples == 4 * int(needed.sum())
