"""The recipes of the named systems: they train, and they state what their heads say."""

from math import log

import pytest
import torch

import anybatch as ab
from anybatch.recipe.build import Built, build
from anybatch.recipe.runs import read_recipe
from command_line import NUM_TRAIN, recipe

RECIPES = [
    "tf-mnist-beginners-digits",
    "dln-logistic-digits",
    "dln-mlp-digits",
    "dln-sum-digits",
    "ng-digits",
    "goyal-digits",
]


def shipped(name: str, *changes: str) -> Built:
    """What a recipe that comes with the package builds."""
    found, _, _ = read_recipe(name, changes, allow_code=False)
    return build(found, allow_code=False)


def losses(built: Built) -> list[float]:
    """The loss of each update of a training, penalties left out."""
    return [
        step.parts["data"]
        for step in ab.steps(
            built.model,
            built.objective,
            built.optimizer,
            built.data,
            order=built.order,
            epochs=built.recipe.run.epochs,
            layout=built.layout,
            schedule=built.schedule,
            clip=built.clip,
        )
    ]


def falls(found: list[float]) -> bool:
    """Whether the last third of the losses lies a twentieth below the first, or more."""
    third = len(found) // 3
    return sum(found[-third:]) < 0.95 * sum(found[:third])


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_of_a_recipe_falls(name: str) -> None:
    epochs = {"dln-logistic-digits": 6, "goyal-digits": 3}.get(name, 2)  # of 2 and 6 updates
    assert falls(losses(shipped(name, f"run.epochs={epochs}")))


@pytest.mark.parametrize(
    "keys",
    [
        {
            "model.name": "cifar_tutorial",
            "model.args": {"image": 8, "channels": 1},
            "objective.penalty": [
                {"kind": "L2", "strength": 0.004, "on": ["local3.weight", "local4.weight"]}
            ],
            "optimizer.lr": 0.1,
            "batch.size": 32,
            "run.epochs": 4,
        },
        {"model.name": "caffe_lenet", "model.args": {"image": 8}, "batch.size": 64}
        | {"optimizer.lr": 0.01, "optimizer.args": {"momentum": 0.9}, "run.epochs": 2},
    ],
    ids=["cifar_tutorial", "caffe_lenet"],
)
def test_the_convolutional_originals_learn_the_digits(keys: dict[str, object]) -> None:
    assert falls(losses(build(recipe(**keys), allow_code=False)))


def test_a_recipe_that_learns_nothing_does_not_fall() -> None:  # the control
    assert not falls(losses(shipped("ng-digits", "run.epochs=1", "optimizer.lr=1e-9")))


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("tf-mnist-beginners-digits", 1),
        ("dln-logistic-digits", 1),
        ("dln-mlp-digits", 1),
        ("dln-sum-digits", 20),  # summed over the batch
    ],
)
def test_what_starts_at_zeros_starts_at_the_logarithm_of_ten(name: str, examples: int) -> None:
    first = losses(shipped(name, "run.epochs=1"))[0]
    assert first == pytest.approx(examples * log(10), rel=1e-6)  # float32


def test_numbers_that_follow_from_the_number_of_digits_are_right() -> None:
    ng = shipped("ng-digits")
    assert len(ng.parts.train) == NUM_TRAIN
    assert [term.strength for term in ng.objective.penalty or ()] == [1 / NUM_TRAIN]
    assert shipped("tf-mnist-beginners-digits").order.num_steps(70) == 1006  # of 100 each
    assert shipped("dln-mlp-digits").order.num_steps(141) == 10_011


def test_the_rate_of_goyals_recipe_warms_up_and_drops() -> None:
    built = shipped("goyal-digits")
    epoch = NUM_TRAIN
    rates = [built.schedule(round(epoch * e)) for e in (0, 2.5, 5, 8.99, 9, 18, 24, 27)]
    expected = [0.0125, (0.0125 + 0.1) / 2, 0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert built.objective.grain == 32
    spared = [name for name, p in built.model.named_parameters() if p.ndim == 1]
    held = [name for name in dict(built.model.named_parameters()) if name not in spared]
    (penalty,) = built.objective.penalty or ()
    assert sorted(ab.penalties.held_by(penalty, built.model)) == sorted(held)


def weights_after(name: str, *changes: str) -> torch.Tensor:
    """All weights after one epoch in float64."""
    built = shipped(name, "run.epochs=1", "run.dtype=float64", *changes)
    losses(built)
    return torch.cat([p.detach().flatten() for p in built.model.parameters()])


def test_the_sum_and_its_mean_conversion_make_the_same_path() -> None:
    mean, as_sum = weights_after("dln-mlp-digits"), weights_after("dln-sum-digits")
    # float64; 71 updates of which each rounds otherwise
    assert (as_sum - mean).norm() < 1e-12 * mean.norm()
    same_penalty = weights_after(
        "dln-sum-digits", 'objective.penalty=[{kind = "L2", strength = 0.0002}]'
    )
    assert (same_penalty - mean).norm() > 1e-5 * mean.norm()  # control: it does not convert alone
    ragged = [weights_after(f"dln-{name}-digits", "batch.last=keep") for name in ("mlp", "sum")]
    assert (ragged[1] - ragged[0]).norm() > 1e-5 * mean.norm()  # control: nor do 18 of 20
