"""Content of `.grad` after an update: replaced, clipped, rounded once; batches of any form.

Oracles: plain autograd on the whole batch, and arithmetic by hand. Tolerance where none is
named: 1e-12 in float64, relative, for sums in another order.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.pytree import Uncollated
from cases import distance, flat_gradient

LAYOUTS = [ab.Layout(), ab.Layout(1), ab.Layout((1, 4, 2))]
REDUCTIONS = [ab.Mean(), ab.Max()]  # one pass and two


class Branches(nn.Module):
    """One branch for x > 0 and one for the others, and a weight that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.above, self.below = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
        self.idle = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return torch.cat([(self.above if one > 0 else self.below)(one) for one in x])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_trainable_parameter_gets_a_gradient_and_frozen_ones_none(layout, reduction):
    torch.manual_seed(0)
    model = Branches()
    x = torch.arange(1.0, 8, dtype=torch.float64)[:, None]  # `below` is never taken
    ab.batch_gradient(model, ab.Objective(lambda m, x: m(x), reduction), x, layout=layout)
    assert model.idle.grad.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert model.below.weight.grad.item() == model.below.bias.grad.item() == 0
    assert model.above.bias.grad.item() == pytest.approx(1)
    assert model.frozen.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_replaced_and_never_accumulated(layout, reduction):
    model = nn.Linear(3, 1).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    objective = ab.Objective(lambda m, x: m(x)[:, 0], reduction)
    ab.batch_gradient(model, objective, x, layout=layout)
    once = flat_gradient(model)
    model.weight.grad.fill_(7)
    ab.batch_gradient(model, objective, x, layout=layout)
    assert torch.equal(flat_gradient(model), once)


def test_after_an_error_no_partial_gradient_is_left():
    model = nn.Linear(3, 1).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    x[6] = torch.nan
    model.weight.grad = torch.ones(1, 3, dtype=torch.float64)
    objective = ab.Objective(lambda m, x: m(x)[:, 0])
    with pytest.raises(ab.errors.DivergenceError, match="place in the batch: 6"):
        ab.batch_gradient(model, objective, x, layout=ab.Layout(2))
    assert model.weight.grad is None


def test_a_tensor_in_two_terms_counts_in_both():
    model, x = nn.Linear(3, 1).double(), torch.randn(7, 3, dtype=torch.float64)

    def both(model, x):
        values = model(x)[:, 0]
        return {"a": values, "b": values}

    objective = ab.Objective(both, {"a": ab.Mean(), "b": 2 * ab.Mean()})
    for layout in LAYOUTS:
        ab.batch_gradient(model, objective, x, layout=layout)
        assert distance(model.weight.grad[0], 3 * x.mean(0)) < 1e-12


def bfloat16_sums(model, x, targets):
    """Gradients of single examples as bfloat16 has them: their mean in float64, and in bfloat16."""
    exact, naive = [], []
    for one, target in zip(x, targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(one[None]).float(), target[None]).backward()
        exact.append(flat_gradient(model))
        naive.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    rounded = naive[0]
    for one in naive[1:]:
        rounded = rounded + one
    return torch.stack(exact).mean(0), (rounded / len(x)).double()


def test_bfloat16_parameters_accumulate_in_float32_and_are_rounded_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    x, targets = torch.randn(64, 5).bfloat16(), torch.randint(3, (64,))
    exact, naive = bfloat16_sums(model, x, targets)

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    ab.batch_gradient(model, ab.Objective(losses), (x, targets), layout=ab.Layout(1))
    result = flat_gradient(model)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    # Rounding once is off by 2^-8 of a number at most; 1e-6 is for the sum in float32.
    assert ((result - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert distance(naive, exact) > 5 * distance(result, exact)


def clip_gradient(max_norm, scale=1.0, penalty=None, layout=None):
    """Gradients of one problem, its losses scaled, with and without clipping; and the result."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(7, 3, dtype=torch.float64)
    objective = ab.Objective(lambda m, x: scale * m(x).square().sum(1), penalty=penalty)
    ab.batch_gradient(model, objective, x)
    plain = flat_gradient(model)
    result = ab.batch_gradient(model, objective, x, clip=ab.ClipNorm(max_norm), layout=layout)
    return plain, flat_gradient(model), result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("penalty", [None, ab.L2(3.0)])
def test_clipping_scales_the_whole_gradient_to_the_norm(penalty, layout):
    plain, result, gradient = clip_gradient(0.25, penalty=penalty, layout=layout)
    assert plain.norm() > 0.25
    assert distance(result, plain * (0.25 / plain.norm())) < 1e-12
    assert gradient.norm.item() == pytest.approx(plain.norm().item(), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_whose_draws_are_found_out_on_the_way_is_clipped_too(layout):
    model, x = nn.Linear(3, 2).double(), torch.randn(7, 3, dtype=torch.float64)
    objective = ab.Objective(lambda m, x: F.dropout(m(x).square()).sum(1) + 1, grain=1)
    clip, key = ab.ClipNorm(1e-3), ab.Key(0, 0)
    ab.batch_gradient(model, objective, x, key=key, clip=clip, layout=layout)
    assert flat_gradient(model).norm().item() == pytest.approx(1e-3, rel=1e-12, abs=0)


def test_clipping_leaves_a_shorter_gradient_its_bits():
    plain, result, gradient = clip_gradient(1e3)
    assert torch.equal(result, plain)
    assert gradient.norm.item() == pytest.approx(plain.norm().item(), rel=1e-12)


def test_clipping_has_no_epsilon_that_would_set_a_scale():
    plain, _, _ = clip_gradient(1.0, scale=1e-6)
    half = plain.norm().item() / 2
    _, result, _ = clip_gradient(half, scale=1e-6)
    assert distance(result, plain / 2) < 1e-12
    with_epsilon = plain * (half / (plain.norm() + 1e-6))  # torch.nn.utils.clip_grad_norm_
    assert distance(with_epsilon, plain / 2) > 0.01


def test_a_gradient_of_zero_is_not_clipped_to_nan():
    model = nn.Linear(3, 1)
    objective = ab.Objective(lambda m, x: 0 * m(x)[:, 0])
    result = ab.batch_gradient(model, objective, torch.ones(2, 3), clip=ab.ClipNorm(1.0))
    assert result.norm == 0
    assert flat_gradient(model).tolist() == [0, 0, 0, 0]


def test_without_clipping_no_norm_is_computed():
    model = nn.Linear(3, 1)
    result = ab.batch_gradient(model, ab.Objective(lambda m, x: m(x)[:, 0]), torch.ones(2, 3))
    assert result.norm is None


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_a_clip_norm_that_is_no_length_is_refused(max_norm):
    with pytest.raises(ab.errors.LossError, match=r"ClipNorm has max_norm=.* above 0"):
        ab.ClipNorm(max_norm)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_coefficients_and_metrics_are_told_in_every_layout(layout):
    model, x = nn.Linear(3, 1).double(), torch.arange(21, dtype=torch.float64).reshape(7, 3)
    counts = torch.tensor([1, 0, 2, 1, 0, 3, 1])

    def losses(model, batch):
        x, n = batch
        hits = torch.where(n > 0, x[:, 0], torch.nan)
        return ab.ExampleLosses(model(x)[:, 0] * n, n, metrics={"hits": hits})

    objective = ab.Objective(losses, penalty=ab.L2(2.0) + ab.L1(1.0, on="bias"))
    ids = [31, 5, 7, 2, 9, 4, 8]
    result = ab.batch_gradient(model, objective, (x, counts), layout=layout, ids=ids)
    expected = model(x).detach()[:, 0] * counts
    assert distance(result.losses.values, expected) < 1e-12
    assert not result.losses.values.requires_grad
    assert result.losses.counts.tolist() == counts.tolist()
    assert result.coefficients.tolist() == pytest.approx([1 / 8, 0, 1 / 8, 1 / 8, 0, 1 / 8, 1 / 8])
    assert result.metrics["hits"].item() == (0 + 6 + 9 + 15 + 18) / 8
    assert result.ids.tolist() == ids
    parts = {
        "data": expected.sum().item() / 8,
        "L2": model.weight.square().sum().item(),
        "L1(bias)": model.bias.abs().sum().item(),
    }
    assert {name: part.item() for name, part in result.parts.items()} == pytest.approx(parts)
    assert result.loss.item() == pytest.approx(sum(parts.values()))


class Point(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_nest_and_share_leaves(layout):
    torch.manual_seed(0)
    model, table = nn.Linear(2, 1).double(), torch.randn(4, 2, dtype=torch.float64)
    points = torch.randn(7, 2, 2, dtype=torch.float64)
    rows, signs = np.arange(7) % 4, [1.0, -1, 1, 1, -1, 1, -1]

    def losses(model, batch):
        point, (extra, found_rows) = batch["point"], batch["more"]
        assert isinstance(point, Point)
        assert isinstance(found_rows, np.ndarray)
        inputs = point.left - point.right + extra["table"][torch.as_tensor(found_rows)]
        return model(inputs)[:, 0] * batch["signs"]

    batch = {
        "point": Point(points[:, 0], points[:, 1]),
        "more": ({"table": ab.Shared(table)}, rows),
        "signs": torch.tensor(signs, dtype=torch.float64),
        "nothing": None,
    }
    result = ab.batch_gradient(model, ab.Objective(losses), batch, layout=layout)
    inputs = points[:, 0] - points[:, 1] + table[rows]
    expected = (batch["signs"][:, None] * inputs).mean(0)
    assert distance(model.weight.grad[0], expected) < 1e-12
    assert result.num_examples == len(result.losses.values) == 7


def test_uncollated_examples_are_padded_to_the_longest_of_their_micro_batch():
    torch.manual_seed(0)
    texts = [torch.randint(1, 7, (length,)) for length in (2, 5, 1, 3, 3, 2, 4)]
    model, widths = nn.Embedding(7, 3, padding_idx=0).double(), []

    def collate(examples):
        return nn.utils.rnn.pad_sequence(examples, batch_first=True)

    def losses(model, ids):
        widths.append(ids.shape[1])
        mask = ids != 0
        return ab.ExampleLosses((model(ids).square().sum(2) * mask).sum(1), mask.sum(1))

    objective = ab.Objective(losses)
    ab.batch_gradient(model, objective, Uncollated(texts, collate), layout=ab.Layout(3))
    result = flat_gradient(model)
    assert widths == [5, 3, 4]
    counts = torch.bincount(torch.cat(texts), minlength=7)
    expected = 2 * model.weight.detach() * counts[:, None] / counts.sum()
    assert distance(result, expected.flatten()) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_around_the_update_reaches_the_weights_in_every_layout(reduction):
    # Casts are cached: one made without a graph must not stand in for one with it.
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(7, 3)
    objective = ab.Objective(lambda m, x: m(x)[:, 0].float(), reduction)
    gradients = []
    for layout in LAYOUTS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ab.batch_gradient(model, objective, x, layout=layout)
        gradients.append(flat_gradient(model))
    assert gradients[0].norm() > 0.1
    for other in gradients[1:]:
        assert distance(other, gradients[0]) < 2**-7  # a unit of bfloat16


@pytest.mark.parametrize("size", [None, 3])
def test_a_metric_without_counts_is_its_mean(size):
    hits = torch.tensor([1.0, 0, 0, 1, 1, 0, 1])

    def losses(model, batch):
        x, hits = batch
        return ab.ExampleLosses(model(x)[:, 0], metrics={"hits": hits})

    layout = None if size is None else ab.Layout(micro_batch=size)
    data, objective = (torch.ones(7, 2), hits), ab.Objective(losses)
    result = ab.batch_gradient(nn.Linear(2, 1), objective, data, layout=layout)
    assert result.metrics["hits"].item() == pytest.approx(4 / 7, rel=1e-6)  # rounded to float32
