"""Rules of scaling, each against what it is to keep: computed by torch's own optimisers, or
written out from the paper that it comes from.

Where a rule is exact, two ways of rounding are all that is left: 1e-14. Where it holds to first
order, the tolerance is the next order, stated there.
"""

import math

import pytest
import torch
from torch import nn

import anybatch as ab
from anybatch.errors import RecipeError
from anybatch.recipe.scaling import rescale, rules
from anybatch.recipe.schema import Recipe
from command_line import recipe

EXACT = 1e-14
KS = [0.25, 0.5, 3.0, 8.0]


def close(result: float, wanted: float, tolerance: float = EXACT) -> bool:
    return abs(result - wanted) <= tolerance * abs(wanted)


def test_the_worked_figures_of_the_paper() -> None:
    # Goyal et al. 2017, section 5.1: 0.1 for 256, 3.2 for 8,192
    assert close(rules.linear(0.1, 8192 / 256), 3.2)
    assert close(rules.square_root(1e-3, 4), 2e-3)
    assert close(rules.noise_size(1e-8, 4), 5e-9)
    assert close(rules.retention(0.9, 4), 0.6561)
    assert close(rules.first_order(0.9, 4), 0.6)
    assert close(rules.running_statistics(0.1, 2), 0.19)
    assert close(rules.sum_of_squares(0.1, 4), 0.00625)
    assert rules.half_life(0.1, 0.0, 4) == (0.4, 0.0)  # the linear rule


# Malladi et al. 2022: the SDE of Adam is in the time eta^2 a step, and its coefficients are
# c1 = (1 - beta1) / eta^2, c2 = (1 - beta2) / eta^2, sigma0 = sigma eta, eps0 = eps eta, with the
# noise sigma of a batch, which falls by sqrt(k).


def invariants(result: Recipe, noise: float, steps: float) -> dict[str, float]:
    """Return what makes the SDE; the time that it runs for besides."""
    args, eta = result.optimizer.args, result.optimizer.lr
    return {
        "c1": (1 - args["betas"][0]) / eta**2,
        "c2": (1 - args["betas"][1]) / eta**2,
        "sigma0": noise * eta,
        "eps0": args["eps"] * eta,
        "time": steps * eta**2,
    }


def adam(**args: float | list[float]) -> Recipe:
    keys = {"optimizer.name": "adam", "optimizer.lr": 1e-3, "batch.size": 100}
    stated = {"betas": [0.98, 0.999], "eps": 1e-6} | args
    return recipe(**keys, **{"optimizer.args": stated})


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_carried_recipe_of_adam_has_the_same_sde(k: int) -> None:
    converted = rescale(adam(), batch_size=100 * k).recipe
    before = invariants(adam(), noise=5.0, steps=800)
    after = invariants(converted, noise=5.0 / math.sqrt(k), steps=800 / k)
    for name in ("sigma0", "eps0", "time"):
        assert close(after[name], before[name]), name
    for name, beta in (("c1", 0.98), ("c2", 0.999)):
        # (1 - beta^k) / k = (1 - beta) (1 - (k - 1) (1 - beta) / 2 + ...), no more than that less
        next_order = (k - 1) * (1 - beta) / 2
        assert close(after[name], before[name], tolerance=next_order + 1e-12), name


def test_the_sde_tells_the_linear_rule_and_a_forgotten_epsilon_apart() -> None:  # the control
    before = invariants(adam(), noise=5.0, steps=800)
    wrong = rescale(adam(), batch_size=400, rule="linear").recipe
    after = invariants(wrong, noise=2.5, steps=200)
    assert after["sigma0"] / before["sigma0"] == pytest.approx(2.0)
    assert after["c2"] / before["c2"] == pytest.approx(1 / 16)
    assert after["eps0"] / before["eps0"] == pytest.approx(4.0)


@pytest.mark.parametrize("k", KS)
def test_beta_to_the_k_and_the_first_order_agree_to_first_order(k: float) -> None:
    for small in (1e-2, 1e-3, 1e-4):
        near, exact = rules.first_order(1 - small, k), rules.retention(1 - small, k)
        assert abs(near - exact) <= abs(k * (k - 1)) / 2 * small**2 * 1.1  # the next order


def test_the_first_order_is_refused_once_nothing_is_left_to_keep() -> None:
    with pytest.raises(
        RecipeError, match=r"1 - k \(1 - r\) = .* for r = 0.9 and k = 10\. .* Use r\^k = 0.3487"
    ):
        rules.first_order(0.9, 10)
    assert rules.retention(0.9, 10) == pytest.approx(0.3486784401)
    assert rules.first_order(0.9, 9.99) > 0


def displacement(lr: float, momentum: float, num_updates: int, nesterov: bool) -> float:
    """Return how far one gradient of 1 moves a weight, in that many updates of torch's SGD."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=nesterov)
    for step in range(num_updates):
        w.grad = torch.full_like(w, float(step == 0))
        optimizer.step()
    return -w.item()


@pytest.mark.parametrize("updates", [1, 5, 400])
def test_half_life_keeps_what_a_gradient_moves_over_the_same_examples(updates: int) -> None:
    k, m = 4, 0.95
    lr, momentum = rules.half_life(0.01, m, k)
    after = displacement(lr, momentum, updates, nesterov=False)
    assert close(after, k * displacement(0.01, m, k * updates, nesterov=False), 1e-12)


def test_half_life_keeps_the_total_of_nesterov_and_the_linear_rule_both_do_at_last() -> None:
    k, m = 4, 0.95
    lr, momentum = rules.half_life(0.01, m, k)
    total = k * displacement(0.01, m, 2000, nesterov=True)
    assert close(displacement(lr, momentum, 2000, nesterov=True), total, 1e-12)
    assert close(displacement(rules.linear(0.01, k), m, 2000, nesterov=True), total, 1e-12)
    early = k * displacement(0.01, m, 20, nesterov=False)  # the control: the linear rule lags
    assert displacement(rules.linear(0.01, k), m, 5, nesterov=False) < 0.6 * early


@pytest.mark.parametrize("k", [2, 5])
def test_an_average_of_weights_is_the_same_after_the_same_examples(k: int) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    averages = [ab.Average(model, 0.9), ab.Average(model, rules.retention(0.9, k))]
    nn.init.ones_(model.weight)
    for average, num_updates in zip(averages, (3 * k, 3), strict=True):
        for _ in range(num_updates):
            average.update(model)
    before, after = (average.state_dict()["weights"]["weight"].item() for average in averages)
    assert close(after, before, 1e-12)


@pytest.mark.parametrize("k", [2, 5])
def test_running_statistics_are_the_same_after_the_same_examples(k: int) -> None:
    batch = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = [
        nn.BatchNorm1d(3, momentum=m).double() for m in (0.1, rules.running_statistics(0.1, k))
    ]
    for norm, num_updates in zip(norms, (3 * k, 3), strict=True):
        for _ in range(num_updates):
            norm(batch)
    for name in ("running_mean", "running_var"):
        before, after = (getattr(norm, name) for norm in norms)
        assert torch.allclose(after, before, rtol=1e-12, atol=0), name
    assert not torch.allclose(norms[0].running_mean, 0.3 * batch.mean(0), rtol=1e-3)


@pytest.mark.parametrize("rate", [1.0, math.sqrt(8), 8.0])
def test_decoupled_decay_shrinks_weights_by_as_much_over_the_same_examples(rate: float) -> None:
    k, lr, decay = 8, 1e-3, 0.1
    after = 1 - lr * rate * rules.adamw_decay(decay, rate, k)
    assert close(after, (1 - lr * decay) ** k, tolerance=k**2 / 2 * (lr * decay) ** 2)
    if rate != k:  # the control: of the linear rule alone the decay stays
        assert not close(1 - lr * rate * decay, (1 - lr * decay) ** k, 1e-6)


# Where gradients are nothing but noise, of size s / sqrt(B), a path is a random walk: the sum of
# squares of its updates between two numbers of examples is what the rule is to keep.


def walk(name: str, batch_size: int, lr: float, args: dict[str, float]) -> float:
    """Sum of squared updates from 4,000 to 64,000 examples, gradients +- 1 / sqrt(B)."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([w], lr=lr, **args)
    total = 0.0
    for step in range(64_000 // batch_size):
        w.grad = torch.full_like(w, (-1.0) ** (step // 2) / math.sqrt(batch_size))
        before = w.item()
        optimizer.step()
        total += (w.item() - before) ** 2 if step * batch_size >= 4_000 else 0.0
    return total


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad"])
def test_noise_moves_weights_as_far_over_the_same_examples(name: str) -> None:
    args = {"eps": 1e-2} | ({"initial_accumulator_value": 5.0} if name == "Adagrad" else {})
    stated = recipe(
        **{"optimizer.name": name.lower(), "optimizer.lr": 0.01, "optimizer.args": args},
        **{"batch.size": 10},
    )
    converted = rescale(stated, batch_size=80).recipe.optimizer
    before = walk(name, 10, 0.01, args)
    # sums over updates, in place of an integral: off by half an update of 800 and more
    assert close(walk(name, 80, converted.lr, converted.args), before, 0.02)
    others = [0.01 * k for k in (1.0, math.sqrt(8), 8.0) if not close(0.01 * k, converted.lr)]
    for wrong in others:  # the control
        assert not close(walk(name, 80, wrong, converted.args), before, 0.5)


def test_adagrad_under_sqrt_keeps_what_a_gradient_without_noise_does() -> None:
    stated = recipe(
        **{"optimizer.name": "adagrad", "optimizer.lr": 0.01, "batch.size": 10},
        **{"optimizer.args": {"initial_accumulator_value": 5.0, "eps": 0.1}},
    )
    converted = rescale(stated, batch_size=80, rule="sqrt").recipe.optimizer

    def move_weight(batch_size: int, lr: float, args: dict[str, float]) -> float:
        w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adagrad([w], lr=lr, **args)
        for _ in range(64_000 // batch_size):
            w.grad = torch.ones_like(w)
            optimizer.step()
        return -w.item()

    before = move_weight(10, 0.01, stated.optimizer.args)
    assert close(
        move_weight(80, converted.lr, converted.args), before, 0.02
    )  # sums for an integral
    assert not close(move_weight(80, 0.01, converted.args), before, 0.5)  # the control


def test_the_decay_of_adagrads_rate_stays_a_function_of_examples() -> None:
    stated = {"optimizer.name": "adagrad", "optimizer.lr": 0.01, "batch.size": 10}
    before = recipe(**stated, **{"optimizer.args": {"lr_decay": 1e-3}})
    after = rescale(before, batch_size=40).recipe.optimizer.args["lr_decay"]
    updates = 1000
    assert close(1 + updates * after, 1 + 4 * updates * 1e-3)
