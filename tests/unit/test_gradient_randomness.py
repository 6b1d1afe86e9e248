"""Random numbers of a model come from the key and the grain, and from nothing else.

Oracle: `cases.oracle`, plain autograd with the generators seeded by hand for each grain.
Tolerance: 1e-12 in float64; where the same arithmetic must be repeated, the same bits.
"""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import anybatch as ab
from cases import SEED, STEP, Problem, Values, distance, flat_gradient, oracle

KEY = ab.Key(SEED, STEP)
SPLITS = [None, 3, 6, (3, 6, 3)]


def by_function(h):
    return F.dropout(h, 0.5)


def by_numpy(h):
    return h * torch.as_tensor(np.random.rand(*h.shape))  # noqa: NPY002


def by_random(h):
    return h * random.random()


class Drawing(nn.Module):
    """Two linear layers with a draw between them, in training alone."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.draw = draw
        self.before, self.after = nn.Linear(3, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x):
        h = self.before(x).tanh()
        return self.after(self.draw(h) if self.training else h)[:, 0] ** 2


class Checkpointed(Drawing):
    """Draw inside a checkpointed segment, which runs again in the backward pass."""

    def __init__(self, draw, reentrant):
        super().__init__(draw)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.before(x).tanh()
        return checkpoint(self.segment, h, use_reentrant=self.reentrant)[:, 0] ** 2

    def segment(self, h):
        return self.after(self.draw(h))


DRAWS = [by_function, by_numpy, by_random]


def batch(size=12):
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(model, x, split=None, key=KEY, grain=3, reduction=ab.Mean()):  # noqa: B008
    objective = ab.Objective(lambda model, x: model(x), reduction, grain=grain)
    ab.batch_gradient(model, objective, x, key=key, layout=ab.Layout(split))
    return flat_gradient(model)


def truth(model, x, grain=3):
    problem = Problem(model, (x,), lambda model, batch: Values(model(batch[0])), grain)
    return oracle(problem, lambda model, results: results.values.mean()).gradient


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_outside_modules_are_found_and_keyed(draw, split):
    model, x = Drawing(draw), batch()
    for _ in range(2):  # found at the first update, known at the second
        assert distance(gradient(model, x, split), truth(model, x)) < 1e-12


@pytest.mark.parametrize("reduction", [ab.Max(), ab.Tilted(1.0)])
@pytest.mark.parametrize("draw", DRAWS)
def test_both_passes_draw_the_same(draw, reduction):
    model, x = Drawing(draw), batch()
    whole = gradient(model, x, reduction=reduction)
    assert distance(gradient(model, x, 3, reduction=reduction), whole) < 1e-12


@pytest.mark.parametrize("layout", [ab.Layout(), ab.Layout(3)])
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_without_a_key_are_refused(draw, layout):
    model, objective = Drawing(draw), ab.Objective(lambda model, x: model(x), grain=3)
    for _ in range(2):
        with pytest.raises(ab.errors.ModelError, match=r"draws random numbers.*Pass key="):
            ab.batch_gradient(model, objective, batch(), layout=layout)
        ab.batch_gradient(model, objective, batch(), layout=layout, key=KEY)  # now it is known


@pytest.mark.parametrize("draw", DRAWS)
def test_what_one_mode_has_shown_says_nothing_of_the_other(draw):
    model, x = Drawing(draw), batch()
    gradient(model.eval(), x, 2, key=None)  # draws nothing
    with pytest.raises(ab.errors.ModelError, match="draws random numbers"):
        gradient(model.train(), x, key=None)
    gradient(model, x)
    gradient(model.eval(), x, 2, key=None)  # no grain is cut, since none is needed
    assert distance(gradient(model.train(), x), truth(model, x)) < 1e-12


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_found_in_a_model_that_couples_too(draw):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), batch()
    objective = ab.Objective(lambda model, x: draw(model(x)).sum(1), grain=3)
    ab.batch_gradient(model, objective, x, key=KEY)
    with pytest.raises(ab.errors.ModelError, match="draws random numbers"):
        ab.batch_gradient(model, objective, x)


def test_the_same_key_repeats_the_bits_and_another_does_not():
    model, x = Drawing(by_function), batch()
    first = gradient(model, x)
    torch.rand(5), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(gradient(model, x), first)
    for other in (ab.Key(SEED, STEP + 1), ab.Key(SEED + 1, STEP)):
        assert distance(gradient(model, x, key=other), first) > 0.01


def test_the_grain_decides_what_is_drawn_and_the_layout_does_not():
    model, x = Drawing(by_function), batch()
    threes = gradient(model, x, grain=3)
    assert distance(gradient(model, x, 6, grain=3), threes) < 1e-12
    assert distance(gradient(model, x, 6, grain=6), threes) > 0.01


def test_the_grain_decides_the_statistics_and_the_layout_does_not():
    torch.manual_seed(0)
    body, x = (
        [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)],
        batch(),
    )
    model = nn.Sequential(*body).double()
    fours = gradient(copy.deepcopy(model), x, grain=4)
    assert distance(gradient(copy.deepcopy(model), x, 4, grain=4), fours) < 1e-12
    assert distance(gradient(copy.deepcopy(model), x, 6, grain=6), fours) > 0.01


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_activation_checkpointing_changes_nothing(split, reentrant):
    x, plain = batch(), Drawing(by_function)
    model = Checkpointed(by_function, reentrant)
    model.load_state_dict(plain.state_dict())
    expected = truth(plain, x)
    assert distance(gradient(model, x, split), expected) < 1e-12
    assert distance(gradient(model, x, split, reduction=ab.Sum()), 12 * expected) < 1e-12


def states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def fail(h):
    by_function(h), by_numpy(h), by_random(h)
    raise RuntimeError("out of luck")


def all_ways(h):
    return by_random(by_numpy(by_function(h)))


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
@pytest.mark.parametrize(
    ("draw", "error"),
    [(torch.relu, None), (all_ways, "Pass key="), (fail, "out of luck")],
    ids=["draws nothing", "draws", "fails"],
)
def test_the_global_generators_are_left_as_they_were(draw, error, key, split):
    model, x = Drawing(draw), batch()
    before = states()
    if error is None or (draw is all_ways and key is not None):
        for _ in range(2):
            gradient(model, x, split, key)
    else:
        with pytest.raises((ab.errors.ModelError, RuntimeError), match=error):
            gradient(model, x, split, key)
    assert states() == before


def test_dropout_layers_that_are_off_need_neither_key_nor_grains():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1), nn.Flatten(0)).double()
    off = gradient(model.eval(), batch(), split=5, key=None)
    model[1].p = 0.0
    assert torch.equal(gradient(model.train(), batch(), split=5, key=None), off)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.5), "the Dropout '1' draws random numbers"),
        (nn.BatchNorm1d(3), "the BatchNorm1d '1' couples examples"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "the BatchNorm1d '1' couples"),
    ],
)
def test_a_layout_that_cuts_a_grain_is_refused_and_the_layer_named(layer, reason):
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 1), nn.Flatten(0)).double()
    with pytest.raises(ab.errors.LayoutError, match=f"{reason}.*a micro-batch holds 4"):
        gradient(model, batch(), split=4, grain=6)
    with pytest.raises(ab.errors.LayoutError, match=r"Declare Objective\(grain=...\)"):
        gradient(model, batch(), split=4, grain=None)


def test_dropout_inside_a_fused_layer_is_named_too():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 2, 2, dropout=0.5).double()

        def forward(self, x):
            return self.lstm(x[None])[0][0].sum(1)

    with pytest.raises(ab.errors.LayoutError, match="the LSTM 'lstm' draws random numbers"):
        gradient(Reader(), batch(), split=4, grain=6)
