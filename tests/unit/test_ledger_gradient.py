"""Ledger of an update: every quantity, under every reduction, in every layout.

Oracle: `truth`, one plain forward pass of the batch (of each grain, where the model draws), R in
torch (`formulas`) for the coefficients, and `torch.autograd.grad` of each example's values.
Tolerance: 1e-10 in float64, as in `ledger_cases`; the observed update against the unobserved one
1e-12, promise 1 of the design. Under bfloat16, whose numbers have 8 bits, 5 %.
"""

import copy
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError, LossError
from anybatch.gradient.clip import ClipExamples
from anybatch.ledger import calibration
from anybatch.ledger.ledger import Observe
from anybatch.ledger.plain_autograd import make_reference
from anybatch.reductions import Reduction
from cases import (
    PROBLEMS,
    SEED,
    STEP,
    Problem,
    Values,
    distance,
    drop_weights,
    flat_gradient,
    grain_edges,
    seed_by_hand,
)
from formulas import SCHEMES, Scheme
from ledger_cases import LSTM_IN_BFLOAT16

KEY = ab.Key(seed=SEED, step=STEP)
ALL = Observe(parameter_norms=True, alignment=True, share=True, gradients=True)
EXACT, SAME, NARROW = 1e-10, 1e-12, 0.05
KEPT_APART = [name for name in PROBLEMS if name != "batch norm"]
ADDED = {"terms", "contrastive"}  # where figures are those of what an example adds


class Truth(NamedTuple):
    """Gradients by plain autograd: rows of examples, columns of all parameters."""

    rows: Tensor  # grad m_i, or what example i adds
    weights: Tensor  # what rows add up with to the update
    by_name: dict[str, slice]

    @property
    def update(self) -> Tensor:
        return self.weights @ self.rows


def truth(problem: Problem, scheme: Scheme, *, added: bool) -> Truth:
    model = copy.deepcopy(problem.model)
    tell = scheme.tell or problem.tell
    pieces = []
    for index, (a, b) in enumerate(pairwise(grain_edges(problem.size, problem.grain))):
        seed_by_hand(index)
        pieces.append(tell(model, tuple(leaf[a:b] for leaf in problem.batch)))
    whole = Values(*(None if c[0] is None else torch.cat(c) for c in zip(*pieces, strict=True)))
    free = whole.values.detach().requires_grad_()
    (c,) = torch.autograd.grad(scheme.formula(whole._replace(values=free)), free)
    named = dict(model.named_parameters())
    starts = c if added else torch.ones_like(c)
    rows = []
    for i in range(problem.size):
        picked = torch.zeros_like(starts)
        picked[i] = starts[i]
        gradients = torch.autograd.grad(
            whole.values, list(named.values()), picked, retain_graph=True, allow_unused=True
        )
        pairs = zip(gradients, named.values(), strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    edges = [0, *torch.tensor([p.numel() for p in named.values()]).cumsum(0).tolist()]
    by_name = {name: slice(a, b) for name, (a, b) in zip(named, pairwise(edges), strict=True)}
    rows, counts = torch.stack(rows), whole.counts
    if added:
        return Truth(rows, torch.ones_like(rows[:, 0]), by_name)
    counts = torch.ones_like(c) if counts is None else counts
    safe = torch.where(counts > 0, counts, 1)[:, None]
    return Truth(torch.where(counts[:, None] > 0, rows / safe, 0), c * counts, by_name)


def objective_of(problem: Problem, scheme: Scheme) -> ab.Objective:
    tell = scheme.tell or problem.tell
    return ab.Objective(
        lambda model, batch: scheme.pack(tell(model, batch)), scheme.reduction, grain=problem.grain
    )


def layout_of(problem: Problem, number: int) -> ab.Layout:
    grain = problem.grain
    if number % 3 == 0:
        return ab.Layout()
    if number % 3 == 1:
        return ab.Layout(grain or 5)
    size = problem.size
    return ab.Layout((3, size - 3) if grain else (1, 4, size - 5))


def update_of(problem: Problem, scheme: Scheme, **others: Any) -> tuple[ab.Gradient, Tensor]:
    model = copy.deepcopy(problem.model)
    objective = objective_of(problem, scheme)
    gradient = ab.batch_gradient(model, objective, problem.batch, key=KEY, **others)
    return gradient, flat_gradient(model)


def assert_is(ledger: ab.Ledger | None, true: Truth, tolerance: float = EXACT) -> None:
    """Every quantity is that of the oracle."""
    assert ledger is not None
    assert ledger.norms is not None
    assert ledger.alignment is not None
    assert ledger.share is not None
    assert ledger.parameter_norms is not None
    assert ledger.gradients is not None
    update = true.update
    alignment = true.rows @ update
    assert distance(ledger.norms, true.rows.norm(dim=1)) < tolerance
    assert distance(ledger.alignment, alignment) < tolerance
    share = true.weights * alignment / update.square().sum()
    assert distance(ledger.share, share) < tolerance
    assert abs(float(ledger.share.sum()) - 1) < tolerance
    assert list(ledger.parameter_norms) == list(ledger.gradients) == list(true.by_name)
    for name, place in true.by_name.items():
        rows = true.rows[:, place]
        assert (
            ledger.parameter_norms[name] - rows.norm(dim=1)
        ).norm() < tolerance * true.rows.norm()
        assert (ledger.gradients[name].flatten(1) - rows).norm() < tolerance * true.rows.norm()


@pytest.mark.fast(13)
@pytest.mark.parametrize("number", range(60))
def test_every_quantity_under_every_reduction_in_every_layout(number):
    name = list(SCHEMES)[number % len(SCHEMES)]
    scheme = SCHEMES[name]
    build = PROBLEMS[KEPT_APART[(number + number // 10) % len(KEPT_APART)]]
    absent = range(3, 6) if number % 4 == 0 else None  # counts of 0, of a whole grain
    problem = build(12, torch.float64, number, absent)
    true = truth(problem, scheme, added=name in ADDED)
    layout = layout_of(problem, number)
    gradient, update = update_of(problem, scheme, observe=ALL, layout=layout)
    assert_is(gradient.ledger, true)
    assert distance(update, true.update) < EXACT
    plain, unobserved = update_of(problem, scheme, layout=layout)
    assert distance(update, unobserved) < SAME
    assert abs(float(gradient.loss - plain.loss)) < SAME * max(1, abs(float(plain.loss)))
    assert plain.ledger is None
    if absent is not None and name not in ADDED:
        assert bool((gradient.ledger.norms[3:6] == 0).all())


@pytest.mark.fast(8)
@pytest.mark.parametrize("number", range(20))
def test_clipped_examples_add_up_to_the_clipped_update(number):
    name = list(SCHEMES)[number % len(SCHEMES)]
    scheme = SCHEMES[name]
    problem = PROBLEMS[KEPT_APART[number % len(KEPT_APART)]](12, torch.float64, number)
    true = truth(problem, scheme, added=name in ADDED)
    norms = true.rows.norm(dim=1)
    limit = float(norms[norms > 0].median())
    factors = (limit / norms.clamp(min=1e-30)).clamp(max=1)
    clipped = true._replace(weights=true.weights * factors)
    clip = ClipExamples(limit)
    gradient, update = update_of(
        problem, scheme, observe=ALL, clip=clip, layout=layout_of(problem, number)
    )
    assert distance(update, clipped.update) < EXACT
    assert_is(gradient.ledger, clipped)
    _, same = update_of(problem, scheme, clip=clip)  # nothing else asked for
    assert distance(same, update) < SAME
    whole = true.update * min(1, limit / float(true.update.norm()))  # the control: ClipNorm
    assert name == "max" or distance(whole, clipped.update) > 1e-3  # of one example: the same


def test_a_limit_above_all_norms_changes_nothing_and_one_of_zero_is_refused():
    problem = PROBLEMS["perceptron"](12, torch.float64, 0)
    _, plain = update_of(problem, SCHEMES["mean"])
    _, clipped = update_of(problem, SCHEMES["mean"], clip=ClipExamples(1e9))
    assert distance(clipped, plain) < SAME
    with pytest.raises(LossError, match=r"max_norm=0\. It must be a number above 0"):
        ClipExamples(0)


@pytest.mark.fast(2)
@pytest.mark.parametrize("name", ["mean", "tilted", "terms"])
@pytest.mark.parametrize("problem_name", ["tokens", "dropout"])
def test_the_ledger_is_the_same_in_every_layout(name, problem_name):
    problem = PROBLEMS[problem_name](12, torch.float64, 7)
    ledgers = []
    for cut in (None, 6, 3, (3, 9)):
        gradient, _ = update_of(problem, SCHEMES[name], observe=ALL, layout=ab.Layout(cut))
        ledgers.append(gradient.ledger)
    for other in ledgers[1:]:
        for field in ("norms", "alignment", "share"):
            assert distance(getattr(other, field), getattr(ledgers[0], field)) < EXACT
        for parameter, gradients in ledgers[0].gradients.items():
            difference = other.gradients[parameter] - gradients
            assert difference.norm() <= EXACT * gradients.norm()
    flipped = ledgers[0].norms.flip(0)  # the control: figures of other examples
    assert distance(flipped, ledgers[0].norms) > 1e-2


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-10])
@pytest.mark.parametrize("layout", [None, 5])
def test_a_loss_scale_leaves_every_quantity_as_it_is(scale, layout):
    problem, scheme = PROBLEMS["perceptron"](12, torch.float64, 1), SCHEMES["mean"]
    true = truth(problem, scheme, added=False)
    scaled = {"loss_scale": scale, "layout": ab.Layout(layout)}
    gradient, update = update_of(problem, scheme, observe=ALL, **scaled)
    assert_is(gradient.ledger, true)
    assert distance(update, true.update) < EXACT
    limit = float(true.rows.norm(dim=1).median())
    _, clipped = update_of(problem, scheme, clip=ClipExamples(limit), **scaled)
    _, unscaled = update_of(problem, scheme, clip=ClipExamples(limit))
    assert distance(clipped, unscaled) < EXACT


@pytest.mark.parametrize(
    "problem_name",
    ["perceptron", "tokens", "convolution", pytest.param("dropout", marks=LSTM_IN_BFLOAT16)],
)
@pytest.mark.parametrize("layout", [None, 6])
def test_in_bfloat16_the_observed_update_is_the_unobserved_one_but_for_rounding(
    problem_name, layout
):
    problem, scheme = PROBLEMS[problem_name](12, torch.float32, 2), SCHEMES["mean"]
    how = {"precision": "bfloat16", "layout": ab.Layout(layout)}
    gradient, update = update_of(problem, scheme, observe=ALL, **how)
    _, plain = update_of(problem, scheme, **how)
    assert distance(update, plain) < NARROW
    assert_is(gradient.ledger, truth(problem, scheme, added=False), 2 * NARROW)


def test_a_penalty_belongs_to_no_example():
    problem, scheme = PROBLEMS["linear"](12, torch.float64, 3), SCHEMES["mean"]
    true = truth(problem, scheme, added=False)
    objective = ab.Objective(objective_of(problem, scheme).example_losses, penalty=ab.L2(0.5))
    model = copy.deepcopy(problem.model)
    gradient = ab.batch_gradient(model, objective, problem.batch, observe=ALL)
    assert_is(gradient.ledger, true)
    assert distance(flat_gradient(model), true.update) > 1e-2  # it is in the update all the same


def test_parameters_that_nothing_reaches_have_figures_of_zero():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(2, 2)}).double()
    batch = (torch.randn(4, 5).double(), torch.randint(3, (4,)), torch.zeros(4))
    objective = ab.Objective(lambda m, b: drop_weights(m["used"], b).values)
    ledger = ab.batch_gradient(model, objective, batch, observe=ALL).ledger
    assert ledger is not None
    assert bool((ledger.parameter_norms["idle.weight"] == 0).all())
    assert ledger.gradients["idle.weight"].shape == (4, 2, 2)
    assert bool((ledger.parameter_norms["used.weight"] > 0).all())


def test_only_what_is_asked_for_is_there():
    problem, scheme = PROBLEMS["linear"](4, torch.float64, 0), SCHEMES["mean"]
    for asked in ("norms", "parameter_norms", "alignment", "share", "gradients"):
        observe = Observe(**{"norms": False, asked: True})
        ledger = update_of(problem, scheme, observe=observe)[0].ledger
        present = {name for name in ab.Ledger.__slots__ if getattr(ledger, name) is not None}
        assert present == {asked}


class Coupled(nn.Module):
    """Batch normalisation over each grain."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output


@pytest.mark.parametrize("reduction", [ab.Mean(), ab.Sum(), ab.Tilted(0.5)])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_grains_keep_their_norms_where_examples_couple(
    reduction: Reduction, micro_batch: int | None
) -> None:
    torch.manual_seed(0)
    model = Coupled().double()
    x, y = torch.randn(10, 3).double(), torch.randint(2, (10,))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    objective = ab.Objective(losses, reduction, grain=4)
    gradient = ab.batch_gradient(
        model,
        objective,
        (x, y),
        layout=ab.Layout(micro_batch),
        observe=ab.Observe(norms=False, grain_norms=True),
    )
    assert gradient.ledger is not None
    assert gradient.ledger.grain_norms is not None
    assert gradient.ledger.norms is None
    expected, whole = [], []
    for start, stop in [(0, 4), (4, 8), (8, 10)]:  # one grain at a time, by autograd
        model.zero_grad()
        values = losses(model, (x[start:stop], y[start:stop]))
        (values * gradient.coefficients[start:stop]).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        whole.append(torch.cat(gradients))
        expected.append(whole[-1].norm())
    # Tolerance: sums of some hundred float64 terms in another order.
    torch.testing.assert_close(
        gradient.ledger.grain_norms, torch.stack(expected), rtol=1e-12, atol=0
    )
    assert float(torch.stack(whole).sum(0).norm()) < 0.99 * float(sum(expected))  # control


def test_a_model_without_grains_has_no_grain_norms() -> None:
    objective = ab.Objective(lambda model, batch: model(batch[0])[:, 0])
    model = nn.Linear(3, 1)
    with pytest.raises(LedgerError, match="not cut into grains"):
        ab.batch_gradient(
            model, objective, (torch.ones(4, 3),), observe=ab.Observe(grain_norms=True)
        )
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(LedgerError, match="grain_norms=True"):
        ab.batch_gradient(
            Coupled(),
            ab.Objective(lambda model, batch: model(batch[0])[:, 0]),
            (torch.ones(4, 3),),
            observe=ab.Observe(),
        )


class Shared(nn.Module):
    """Two parameters that one gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a + self.b


def test_whole_gradients_that_two_parameters_share_are_scaled_once_each() -> None:
    x = torch.arange(12.0).reshape(4, 3)

    def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().sum(1)

    gradient = ab.batch_gradient(
        Shared(), ab.Objective(losses), (x,), observe=ab.Observe(gradients=True)
    )
    assert gradient.ledger is not None
    assert gradient.ledger.gradients is not None
    for name in ("a", "b"):
        assert torch.equal(gradient.ledger.gradients[name], 2 * x)  # d |x|^2 / dx


def test_a_recurrent_layer_is_observed_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(6, 8, batch_first=True), torch.randn(4, 5, 6)
    with ab.observe(layer) as ledger, torch.autocast("cpu", torch.bfloat16):
        layer(x)[0].float().square().sum().backward()
    plain = nn.GRU(6, 8, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    for i in range(4):
        plain.zero_grad()
        plain(x[i : i + 1])[0].square().sum().backward()
        norm = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None) ** 0.5
        assert float(ledger.norms[i]) == pytest.approx(float(norm), rel=0.05)  # 8 bits, some steps


@pytest.mark.parametrize(("batch", "num_calibrations"), [(1, 0), (2, 1)])  # and control
def test_one_example_alone_is_observed_without_a_calibration(
    batch: int, num_calibrations: int
) -> None:
    model, objective = nn.Linear(3, 2), ab.Objective(lambda model, x: model(x).square().sum(1))
    with mock.patch.object(calibration, "make_reference", wraps=make_reference) as reference:
        for _ in range(3):
            ab.batch_gradient(model, objective, torch.ones(batch, 3), observe=Observe(norms=True))
    assert reference.call_count == num_calibrations
