"""Sum at the converted rate and Mean make the same path, for each of the systems.

At a fixed batch size B, Sum = B Mean, and so are the gradients. From Mean to Sum

    every rate / B,    every penalty * B

and momentum, groups, schedule, grain and average as they are. The oracle is a loop of plain
autograd: the mean of the losses of whole batches, penalties written out, backward, the recipe's
optimiser. It shares the recipe's model, order, schedule and optimiser, and neither the library's
reductions nor its penalties nor its passes. All is float64; two orders of summation round to
1e-16 an update, and 50 updates may multiply that a hundred times: 1e-12 leaves two digits.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.recipe.build import Setup, build
from anybatch.recipe.files import parse_recipe
from anybatch.recipe.runs import load_recipe

NUM_UPDATES = 50
TOLERANCE = 1e-12

Tree = dict[str, Any]


@dataclass(frozen=True, eq=False)
class System:
    """A recipe, at a batch size that is no power of two, by which division would be exact."""

    recipe: str
    batch: int
    changes: dict[str, Any] = field(default_factory=dict)
    sums: bool = False  # the recipe itself has Sum

    def __str__(self) -> str:
        return self.recipe


BOTH = [{"kind": "L1", "strength": 1e-5}, {"kind": "L2", "strength": 2e-4}]
SYSTEMS = [
    System("tf-mnist-beginners-digits", 100),
    System("tf-cifar10-digits", 20),
    System("caffe-lenet-digits", 60),
    System("dln-logistic-digits", 600),
    System("dln-mlp-digits", 20, {"objective.penalty": BOTH}),
    System("dln-sum-digits", 20, sums=True),
    System("ng-digits", 10),
    # rates that change within the 50 updates; two grains, of 32 and 28
    System("goyal-digits", 60, {"schedule.at": [1800, 2400], "schedule.warm_up": 1200}),
]
PENALISED = [system for system in SYSTEMS if "logistic" not in str(system)][1:]


def tree_of(system: System) -> Tree:
    """Return the shipped recipe in float64, with equal batches."""
    recipe, _, _ = load_recipe(system.recipe, [], allow_code=False)
    tree = recipe.model_dump()
    keys = {"run.dtype": "float64", "batch.size": system.batch, "batch.last": "drop"}
    for key, value in (keys | system.changes).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return tree


def convert_recipe(tree: Tree, factor: float, reduction: str, *, penalties: bool = True) -> Tree:
    """Every rate divided by a factor, and every penalty multiplied by it."""
    tree = copy.deepcopy(tree)
    tree["objective"]["reduction"] = reduction
    tree["optimizer"]["lr"] /= factor
    tree["schedule"]["end"] /= factor
    tree["schedule"]["warm_up_start"] /= factor
    for penalty in tree["objective"]["penalty"] if penalties else ():
        penalty["strength"] *= factor
    return tree


def mean_of(system: System) -> Tree:
    """Return the system's recipe with Mean."""
    tree = tree_of(system)
    return convert_recipe(tree, 1 / system.batch, "mean") if system.sums else tree


def sum_of(system: System, **options: bool) -> Tree:
    """Return the recipe with Sum."""
    if system.sums and not options:
        return tree_of(system)
    return convert_recipe(mean_of(system), system.batch, "sum", **options)


def build_from(tree: Tree) -> Setup:
    return build(parse_recipe(tree, "a test"), allow_code=False)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(tree: Tree) -> Tensor:
    """Return the weights after 50 updates of the library."""
    setup = build_from(tree)
    updates = ab.steps(
        setup.model,
        setup.objective,
        setup.optimizer,
        setup.data.columns,
        order=setup.order,
        epochs=NUM_UPDATES,  # enough of them: each has at least one batch
        schedule=setup.schedule,
    )
    outputs = sum(1 for _ in islice(updates, NUM_UPDATES))
    assert outputs == NUM_UPDATES
    return weights_of(setup.model)


@cache
def by_hand(system: System) -> Tensor:
    """Return the weights after 50 updates by plain autograd on the mean."""
    tree = mean_of(system)
    setup = build_from(tree)
    inputs, targets = setup.data.columns
    factors = [group["lr"] / setup.recipe.optimizer.lr for group in setup.optimizer.param_groups]
    for step in range(NUM_UPDATES):
        ids = setup.order.indices(step)
        assert len(ids) == system.batch
        for group, factor in zip(setup.optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * setup.schedule(step * system.batch)
        grains = ids.split(tree["objective"]["grain"] or system.batch)
        losses = [losses_of(tree, setup.model(inputs[few]), targets[few]) for few in grains]
        setup.optimizer.zero_grad()
        (torch.cat(losses).mean() + sum(penalties_of(tree, setup.model))).backward()
        setup.optimizer.step()
    return weights_of(setup.model)


def losses_of(tree: Tree, logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax or sigmoid cross-entropy of each example."""
    if tree["objective"]["loss"] == "cross_entropy":
        return F.cross_entropy(logits, targets, reduction="none")
    y = F.one_hot(targets, 10).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)


def penalties_of(tree: Tree, model: nn.Module) -> Iterator[Tensor]:
    """(a/2) sum w^2 or a sum |w|, over the weights of more than one dimension or as named."""
    for penalty in tree["objective"]["penalty"]:
        named = dict(model.named_parameters())
        contents = [w for w in named.values() if w.ndim > 1]
        if penalty.get("on") == ["*"]:
            contents = list(named.values())
        elif penalty.get("on") is not None:
            contents = [named[name] for name in penalty["on"]]
        for w in contents:
            size = w.square().sum() / 2 if penalty["kind"] == "L2" else w.abs().sum()
            yield penalty["strength"] * size


def distance(result: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((result - wanted).norm() / wanted.norm())


@pytest.mark.fast(1)
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_mean_is_the_plain_loop(system: System) -> None:
    assert distance(train(mean_of(system)), by_hand(system)) <= TOLERANCE


@pytest.mark.fast(1)
@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_the_converted_sum_follows_the_mean(system: System) -> None:
    assert distance(train(sum_of(system)), by_hand(system)) <= TOLERANCE


@pytest.mark.fast(1)
@pytest.mark.parametrize("system", PENALISED, ids=str)
def test_without_the_correction_of_its_penalty_it_does_not(system: System) -> None:
    assert mean_of(system)["objective"]["penalty"]
    result = train(sum_of(system, penalties=False))
    assert distance(result, by_hand(system)) > 1e-6


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s not in PENALISED], ids=str)
def test_without_a_penalty_the_rate_alone_must_be_converted(system: System) -> None:
    tree = mean_of(system)
    assert not tree["objective"]["penalty"]
    tree["objective"]["reduction"] = "sum"
    assert distance(train(tree), by_hand(system)) > 1.0


def test_a_power_of_two_would_have_proved_nothing() -> None:  # why B is none
    system = System("tf-mnist-beginners-digits", 128)
    assert torch.equal(train(sum_of(system)), train(mean_of(system)))
    system = SYSTEMS[0]
    assert not torch.equal(train(sum_of(system)), train(mean_of(system)))
