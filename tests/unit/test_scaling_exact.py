"""Equations that hold exactly between batches and reductions: the ground of the rules.

In float64; where two orders of summation are compared, 1e-14 is a hundred roundings of 1e-16.
"""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.recipe.build import build
from anybatch.recipe.scaling import convert, rescale
from anybatch.recipe.schema import Recipe
from anybatch.reductions import Reduction
from command_line import recipe

ROUNDING = 1e-14
SIZE = 12


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SIZE, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (SIZE,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, (inputs, targets)


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor], reduction: Reduction) -> Tensor:
    ab.batch_gradient(model, ab.Objective(losses, reduction=reduction), batch)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_autograd(model: nn.Module, loss: Tensor) -> Tensor:
    result = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([one.flatten() for one in result])


def distance(result: Tensor, wanted: Tensor) -> float:
    return float((result - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("k", [2, 3, 7])
def test_a_batch_repeated_has_the_same_mean_gradient_and_k_times_the_sum(k: int) -> None:
    model, (inputs, targets) = problem()
    repeated = inputs.repeat(k, 1), targets.repeat(k)
    mean = by_autograd(model, F.cross_entropy(model(inputs), targets))
    assert distance(gradient(model, repeated, ab.Mean()), mean) <= ROUNDING
    assert distance(gradient(model, repeated, ab.Sum()), k * SIZE * mean) <= ROUNDING
    assert distance(gradient(model, repeated, ab.Sum()), SIZE * mean) > 0.9  # the control


def central(loss: Callable[[], Tensor], model: nn.Module, h: float = 2.0**-17) -> Tensor:
    """(L(w + h) - L(w - h)) / 2h for every weight; h a power of two, so that w +- h is exact
    up to w's own last bits."""
    result = []
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                w = p.view(-1)[i].clone()
                ends = []
                for moved in (w + h, w - h):
                    p.view(-1)[i] = moved
                    ends.append(loss())
                p.view(-1)[i] = w
                result.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(result)


def test_central_differences_of_b_times_l_are_b_times_those_of_l() -> None:
    model, (inputs, targets) = problem()

    def mean() -> Tensor:
        return F.cross_entropy(model(inputs), targets)

    of_mean, of_sum = central(mean, model), central(lambda: SIZE * mean(), model)
    # each difference cancels losses near 1: 1e-16 / 2h = 7e-12 beside gradients of 0.1
    assert distance(of_sum, SIZE * of_mean) <= 1e-10
    # and they are the gradients, to h^2 = 6e-11 of the third derivative besides
    assert distance(gradient(model, (inputs, targets), ab.Mean()), of_mean) <= 1e-9
    assert distance(gradient(model, (inputs, targets), ab.Sum()), of_sum) <= 1e-9
    assert distance(gradient(model, (inputs, targets), ab.Mean()), of_sum) > 0.9  # the control


def plain(batch_size: int, lr: float, num_updates: int, result: Recipe) -> Tensor:
    """SGD on the mean of whole batches, written out; order and first weights are the recipe's."""
    setup = build(result, allow_code=False)
    inputs, targets = setup.data.columns
    for step in range(num_updates):
        ids = setup.order.indices(step)
        assert len(ids) == batch_size
        gradients = torch.autograd.grad(
            F.cross_entropy(setup.model(inputs[ids]), targets[ids]), list(setup.model.parameters())
        )
        with torch.no_grad():
            for p, g in zip(setup.model.parameters(), gradients, strict=True):
                p -= lr * g
    return torch.cat([p.detach().flatten() for p in setup.model.parameters()])


def train(result: Recipe, num_updates: int) -> Tensor:
    setup = build(result, allow_code=False)
    updates = ab.steps(
        setup.model,
        setup.objective,
        setup.optimizer,
        setup.data.columns,
        order=setup.order,
        epochs=num_updates,
        schedule=setup.schedule,
    )
    assert sum(1 for _ in islice(updates, num_updates)) == num_updates
    return torch.cat([p.detach().flatten() for p in setup.model.parameters()])


@pytest.mark.parametrize("k", [1, 3, 7])
def test_sum_at_one_fixed_rate_is_mean_under_the_linear_rule(k: int) -> None:
    batch, keys = 20, {"run.dtype": "float64", "batch.last": "drop", "optimizer.lr": 0.1}
    mean = recipe(**keys, **{"batch.size": batch})
    summed = convert(mean, "sum").recipe
    converted = rescale(summed, batch_size=k * batch).recipe
    assert converted.optimizer.lr == summed.optimizer.lr == 0.1 / batch  # one fixed rate
    num_updates = 40 // k
    wanted = plain(k * batch, 0.1 * k, num_updates, converted)
    # 40 updates, each rounded to 1e-16, and errors that training may multiply a hundred times
    assert distance(train(converted, num_updates), wanted) <= 1e-12
    assert distance(train(rescale(mean, batch_size=k * batch).recipe, num_updates), wanted) <= 1e-12
    if k > 1:  # the control: Mean at one fixed rate is another path
        left = rescale(mean, batch_size=k * batch, rule="none").recipe
        assert distance(train(left, num_updates), wanted) > 0.1


@pytest.mark.parametrize("rule", ["auto", "linear", "sqrt", "half-life"])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
def test_to_convert_and_to_carry_is_to_carry_and_to_convert(name: str, rule: str) -> None:
    if rule == "half-life" and name != "sgd":
        rule = "auto"
    args = {"weight_decay": 0.02} | ({"momentum": 0.9} if name == "sgd" else {})
    stated = recipe(
        **{"optimizer.name": name, "optimizer.args": args, "optimizer.clip_norm": 2.0},
        **{"objective.penalty": [{"kind": "L2", "strength": 0.01}], "batch.size": 100},
        **{"schedule.warm_up": 1000, "schedule.warm_up_start": 0.1},
    )
    one = rescale(convert(stated, "sum").recipe, batch_size=300, rule=rule).recipe  # type: ignore[arg-type]
    other = convert(rescale(stated, batch_size=300, rule=rule).recipe, "sum").recipe  # type: ignore[arg-type]
    for section in ("optimizer", "schedule", "objective", "batch"):
        _same(getattr(one, section).model_dump(), getattr(other, section).model_dump())


def _same(result: object, wanted: object) -> None:
    if isinstance(wanted, dict) and isinstance(result, dict):
        assert result.keys() == wanted.keys()
        for key in wanted:
            _same(result[key], wanted[key])
    elif isinstance(wanted, list) and isinstance(result, list):
        for a, b in zip(result, wanted, strict=True):
            _same(a, b)
    else:
        assert result == (pytest.approx(wanted, rel=1e-13) if isinstance(wanted, float) else wanted)
