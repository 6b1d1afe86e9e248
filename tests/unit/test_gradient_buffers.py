"""Buffers take one update a batch, in every layout, and none where the update fails.

Oracle: the formula b' = sum_p (n_p / B) b_p by hand, which for b_p = b/2 + (mean of part p)/2
is b/2 + (mean of the batch)/2. Tolerance: 1e-14, some units of rounding in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab

LAYOUTS = [ab.Layout(), ab.Layout(1), ab.Layout((1, 4, 2))]
REDUCTIONS = [ab.Mean(), ab.Max()]  # one pass and two


class Average(nn.Module):
    """x . w, and moving averages of x kept in the ways that models keep them."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.ones(3, dtype=torch.float64)), drop
        for name in ("in_place", "replaced", "through_data"):
            self.register_buffer(name, torch.ones(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(41))
        self.register_buffer("fixed", torch.tensor([0.1, -0.0, torch.nan, -torch.inf]))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(0), persistent=False)

    def forward(self, x):
        mean = x.detach().mean(0)
        self.in_place.mul_(0.5).add_(mean / 2)
        self.replaced = self.replaced / 2 + mean / 2
        self.through_data.data.mul_(0.5).add_(mean / 2)
        self.count += 1
        if len(self.cache) < 5:
            self.cache = torch.arange(5.0)
        return F.dropout(x, self.drop) @ self.w


def batch(size=7):
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def averages(model):
    return [model.in_place, model.replaced, model.through_data]


def update(model, x, reduction=ab.Mean(), **options):  # noqa: B008
    return ab.batch_gradient(model, ab.Objective(lambda m, x: m(x), reduction), x, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_averages_take_one_update_a_batch(layout, reduction):
    model, x = Average(), batch()
    for updates in (1, 2):
        expected = model.in_place / 2 + x.mean(0) / 2
        update(model, x, reduction, layout=layout)
        for result in averages(model):
            assert (result - expected).abs().max() < 1e-14
        assert model.count == 41 + updates
    assert model.cache.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_part_that_changes_nothing_counts_with_what_was_there(reduction):
    model = nn.Linear(3, 1, bias=False).double()
    model.register_buffer("seen", torch.tensor(4.0, dtype=torch.float64))

    def losses(model, x):
        if (x[:, 0] > 100).any():
            model.seen.fill_(11.0)
        return model(x)[:, 0]

    x = batch()
    x[5, 0] = 200  # in the last of the parts of 1, 4 and 2
    objective = ab.Objective(losses, reduction)
    ab.batch_gradient(model, objective, x, layout=ab.Layout((1, 4, 2)))
    assert model.seen.item() == pytest.approx((1 * 4 + 4 * 4 + 2 * 11) / 7, rel=1e-14, abs=0)


def test_the_formula_tells_an_update_for_each_micro_batch_from_one():
    model, x = Average(), batch()
    model(x[:4]), model(x[4:])
    for result in averages(model):
        assert (result - (0.5 + x.mean(0) / 2)).abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_no_pass_changes_keeps_its_bits_and_its_tensor(layout):
    model = Average()
    fixed, flags = model.fixed, model.flags
    bits = fixed.clone().view(torch.int32)
    update(model, batch(), layout=layout)
    assert model.fixed is fixed
    assert torch.equal(fixed.view(torch.int32), bits)
    assert model.flags is flags
    assert flags.tolist() == [True, False]


def test_a_replaced_buffer_stays_the_tensor_that_it_was():
    model = Average()
    local = model.replaced
    update(model, batch(), layout=ab.Layout(2))
    assert model.replaced is local


@pytest.mark.parametrize("layout", LAYOUTS)
def test_starting_again_in_grains_counts_nothing_twice(layout):
    # The draws are found out only after a pass, which has already changed the buffers.
    model, x = Average(drop=0.5), batch()
    objective = ab.Objective(lambda m, x: m(x), grain=1)
    ab.batch_gradient(model, objective, x, layout=layout, key=ab.Key(0, 0))
    for result in averages(model):
        assert (result - (0.5 + x.mean(0) / 2)).abs().max() < 1e-14
    assert model.count == 42


class Failing(Average):
    """Fails at the example with x[0] > 100, or yields NaN for it."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        losses = super().forward(x)
        if (x[:, 0] > 100).any():
            if self.error is not None:
                raise self.error
            losses = losses * torch.nan
        return losses


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (None, ab.errors.DivergenceError, r"is nan\. It must be a finite number"),
        (RuntimeError("no such token"), RuntimeError, "no such token"),
    ],
    ids=["nan", "raised"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_that_fails_leaves_buffers_as_they_were(layout, error, kind, message, reduction):
    model, x = Failing(error), batch()
    x[4, 0] = 200
    before = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(kind, match=message):
        update(model, x, reduction, layout=layout)
    for name, buffer in model.named_buffers():
        same_nan = {"equal_nan": buffer.is_floating_point()}
        assert buffer.shape == before[name].shape
        assert torch.allclose(buffer, before[name], rtol=0, atol=0, **same_nan), name


class Checkpointed(nn.Module):
    """Batch normalisation that runs forward again during backward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=False).sum(1)


@pytest.mark.parametrize("layout", [ab.Layout(), ab.Layout(4)])
def test_checkpointed_batch_norm_takes_one_update(layout):
    torch.manual_seed(0)
    model, x = Checkpointed(), batch(8)
    norm = model.body[1]
    features = model.body[0](x).detach()
    means = [features[a : a + 4].mean(0) for a in (0, 4)]
    objective = ab.Objective(lambda m, x: m(x), grain=4)
    ab.batch_gradient(model, objective, x.clone(), layout=layout)
    expected = 0.1 * (means[0] + means[1]) / 2
    assert (norm.running_mean - expected).abs().max() < 1e-14
    assert norm.num_batches_tracked == 1
    model(x.clone()).sum().backward()  # a plain loop updates twice
    assert norm.num_batches_tracked == 3


def test_batch_norm_in_eval_mode_neither_couples_nor_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    objective = ab.Objective(lambda m, x: m(x).sum(1))
    ab.batch_gradient(model, objective, batch(), layout=ab.Layout(1))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_float16_statistics_are_averaged_wide_and_rounded_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    x = batch(64).bfloat16()
    objective = ab.Objective(lambda m, x: m(x).float().sum(1), grain=2)
    parts = []
    for a in range(0, 64, 2):
        model[1].reset_running_stats()
        model(x[a : a + 2])
        parts.append(model[1].running_mean.double())
    model[1].reset_running_stats()
    ab.batch_gradient(model, objective, x)
    exact = torch.stack(parts).mean(0)
    assert ((model[1].running_mean - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
