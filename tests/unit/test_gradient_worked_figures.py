"""Figures worked out by hand, through `ab.batch_gradient`.

Averaging: gradients (1.5, -2, 1.1, 0.4, -0.9) and (1.2, 2.3, -1.1, -0.8, -0.7) have the mean
(1.35, 0.15, 0, -0.2, -0.8). Pooling: a parameter added to every input shows, summed over the
batch, where each window sends its gradient back to. Tolerances: figures in float64 whose exact
values are decimals, so some units of rounding, 1e-15; counts of winners are exact.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch as ab

GRADIENTS = torch.tensor(
    [[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]], dtype=torch.float64
)
LAYOUTS = [ab.Layout(), ab.Layout(1)]


class Weights(nn.Module):
    """Parameters w, and nothing else."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))


def products(model, gradients):
    """L_i = g_i . w, a loss that may be negative."""
    return gradients @ model.w


@pytest.mark.parametrize("layout", LAYOUTS, ids=["whole", "one by one"])
def test_losses_of_two_and_minus_two_have_mean_zero_and_a_gradient(layout):
    model = Weights(0, 0, 0, 3.2, -0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = ab.batch_gradient(model, ab.Objective(products), GRADIENTS, layout=layout)

    torch.testing.assert_close(
        result.losses.values, torch.tensor([2, -2.0]).double(), rtol=1e-15, atol=0
    )
    assert abs(result.loss) < 1e-15
    expected = torch.tensor([1.35, 0.15, 0, -0.2, -0.8], dtype=torch.float64)
    torch.testing.assert_close(model.w.grad, expected, rtol=0, atol=1e-15)
    optimizer.step()
    moved = torch.tensor([-0.135, -0.015, 0, 3.22, -0.72], dtype=torch.float64)
    torch.testing.assert_close(model.w.detach(), moved, rtol=0, atol=1e-15)


def test_the_figures_tell_the_last_gradient_and_the_sum_from_the_mean():
    mean = torch.tensor([1.35, 0.15, 0, -0.2, -0.8], dtype=torch.float64)
    for wrong in (GRADIENTS[-1], GRADIENTS.sum(0)):
        assert (wrong - mean).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["whole", "one by one"])
def test_residuals_of_two_and_minus_two_do_not_cancel_in_a_squared_error(layout):
    model, targets = Weights(0.0), torch.tensor([-2.0, 2.0], dtype=torch.float64)
    objective = ab.Objective(lambda model, t: (model.w - t) ** 2)
    result = ab.batch_gradient(model, objective, targets, layout=layout)
    assert result.losses.values.tolist() == [4, 4]
    assert result.loss == 4
    assert model.w.grad == 0  # the gradients 4 and -4 do


@pytest.mark.parametrize("layout", LAYOUTS, ids=["whole", "one by one"])
def test_sum_is_the_mean_times_the_number_of_examples(layout):
    mean, total = Weights(0, 0, 0, 3.2, -0.8), Weights(0, 0, 0, 3.2, -0.8)
    ab.batch_gradient(mean, ab.Objective(products), GRADIENTS, layout=layout)
    ab.batch_gradient(total, ab.Objective(products, ab.Sum()), GRADIENTS, layout=layout)
    torch.testing.assert_close(total.w.grad, 2 * mean.w.grad, rtol=1e-15, atol=0)


class Routes(nn.Module):
    """Max pooling of x + w, w one number a pixel: dL/dw counts what each pixel wins."""

    def __init__(self, side, **pooling):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, side, side, dtype=torch.float64))
        self.pooling = pooling

    def forward(self, x):
        return F.max_pool2d(x + self.w, **self.pooling)


def wins(model, x, micro_batch):
    """Count how often each pixel wins over the batch: the gradient of the sum of all outputs."""
    objective = ab.Objective(lambda model, x: model(x).flatten(1).sum(1), ab.Sum())
    ab.batch_gradient(model, objective, x, layout=ab.Layout(micro_batch))
    return model.w.grad[0]


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_winners_that_differ_over_the_batch_share_a_window_by_their_number(micro_batch):
    x = torch.zeros(8, 1, 4, 4, dtype=torch.float64)
    winners = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # of every window, example by example
    for example, winner in enumerate(winners.tolist()):
        x[example, 0, winner // 2 :: 2, winner % 2 :: 2] = 1
    counts = wins(Routes(4, kernel_size=2), x, micro_batch)
    assert counts.tolist() == torch.tensor([[3.0, 2], [1, 2]]).repeat(2, 2).tolist()
    assert (counts.unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)) == len(x)).all()


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_every_window_of_a_random_batch_hands_back_as_many_gradients_as_examples(micro_batch):
    x = torch.randn(16, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = wins(Routes(6, kernel_size=2), x, micro_batch)
    assert (counts.unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)) == len(x)).all()
    assert counts.max() < len(x)  # or no window would have had different winners


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_of_equal_inputs_the_first_in_row_major_order_wins(micro_batch):
    x = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    counts = wins(Routes(4, kernel_size=2), x, micro_batch)
    assert counts.tolist() == [[3, 0, 3, 0], [0, 0, 0, 0], [3, 0, 3, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_overlapping_windows_add(micro_batch):
    x = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    x[:, :, 1, 1] = 1  # in all four windows of 2x2 at stride 1
    counts = wins(Routes(3, kernel_size=2, stride=1), x, micro_batch)
    assert counts.tolist() == [[0, 0, 0], [0, 8, 0], [0, 0, 0]]


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_rounding_up_gives_the_edge_a_window_of_its_own(micro_batch):
    x = torch.arange(9, dtype=torch.float64).reshape(1, 1, 3, 3).repeat(2, 1, 1, 1)
    up = wins(Routes(3, kernel_size=2, stride=2, ceil_mode=True), x, micro_batch)
    down = wins(Routes(3, kernel_size=2, stride=2), x, micro_batch)
    assert up.tolist() == [[0, 0, 0], [0, 2, 2], [0, 2, 2]]
    assert down.tolist() == [[0, 0, 0], [0, 2, 0], [0, 0, 0]]
