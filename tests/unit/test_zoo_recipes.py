"""Recipes of the named systems: they train, and they state what their heads say."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import anybatch as ab
from anybatch.data.idx import DEBIAN
from anybatch.recipe.build import Setup, build
from anybatch.recipe.runs import load_recipe
from anybatch.recipe.schema import Recipe
from command_line import NUM_TRAIN

SYSTEMS = {  # and what makes its loss on the digits fall within a second or two
    "tf-mnist-beginners": ["run.epochs=2"],
    "tf-cifar10": ["run.epochs=4", "batch.size=32"],  # 12 updates an epoch take it 20 epochs
    "caffe-lenet": ["run.epochs=2"],
    "dln-logistic": ["run.epochs=6"],  # of 2 updates
    "dln-mlp": ["run.epochs=2"],
    "dln-sum": ["run.epochs=2"],
    "ng": ["run.epochs=2"],
    "goyal": ["run.epochs=3"],  # of 6 updates
}


NUM_FASHION = 60_000  # images of Fashion-MNIST's training set


def read(name: str, *changes: str) -> Recipe:
    """A recipe that comes with the package."""
    result, _, _ = load_recipe(name, changes, allow_code=False)
    return result


def read_shipped(name: str, *changes: str) -> Setup:
    """Build a recipe."""
    return build(read(name, *changes), allow_code=False)


def losses(setup: Setup) -> list[float]:
    """Return the loss of each update of a training, penalties left out."""
    return [
        step.parts["data"]
        for step in ab.steps(
            setup.model,
            setup.objective,
            setup.optimizer,
            setup.data.columns,
            order=setup.order,
            epochs=setup.recipe.run.epochs,
            layout=setup.layout,
            schedule=setup.schedule,
            clip=setup.clip,
        )
    ]


def falls(result: list[float]) -> bool:
    """Return whether the last third of the losses lies a twentieth below the first, or more."""
    third = len(result) // 3
    return sum(result[-third:]) < 0.95 * sum(result[:third])


@pytest.mark.fast(1)
@pytest.mark.parametrize(("name", "changes"), SYSTEMS.items(), ids=SYSTEMS)
def test_the_loss_of_a_recipe_falls(name: str, changes: list[str]) -> None:
    assert falls(losses(read_shipped(f"{name}-digits", *changes)))


def test_a_recipe_that_learns_nothing_does_not_fall() -> None:  # the control
    assert not falls(losses(read_shipped("ng-digits", "run.epochs=1", "optimizer.lr=1e-9")))


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
    first = losses(read_shipped(name, "run.epochs=1"))[0]
    assert first == pytest.approx(examples * log(10), rel=1e-6)  # float32


def arithmetic(name: str) -> dict[str, Any]:
    """Return a recipe without its data, the sizes of its model, and keys that count examples."""
    tree = read(name).model_dump(exclude={"data", "run", "stop"})
    del tree["model"]["args"]
    counted = ("at", "every", "warm_up")
    tree["schedule"] |= {key: tree["schedule"][key] is None for key in counted}
    return tree


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_on_digits_differs_in_its_data_and_its_sizes_alone(name: str) -> None:
    fashion, digits = arithmetic(name), arithmetic(f"{name}-digits")
    if name == "ng":  # its penalty is divided by the number of examples
        (ours,), (other,) = (tree["objective"].pop("penalty") for tree in (fashion, digits))
        assert ours["strength"] * NUM_FASHION == pytest.approx(other["strength"] * NUM_TRAIN)
    if name == "caffe-lenet":  # its rate falls with iterations, wherever the images come from
        assert read(name).schedule == read(f"{name}-digits").schedule
    assert fashion == digits


def test_other_systems_differ_in_more() -> None:  # the control
    assert arithmetic("dln-mlp") != arithmetic("dln-sum")
    assert arithmetic("tf-mnist-beginners") != arithmetic("dln-logistic")


def test_numbers_that_follow_from_the_number_of_images_are_right() -> None:
    assert [p.strength for p in read("ng").objective.penalty] == [1 / NUM_FASHION]
    assert read("tf-cifar10").schedule.every == 350 * NUM_FASHION
    goyal = read("goyal")  # 90 epochs: 5 to warm up, drops at 30, 60 and 80
    scale = NUM_FASHION * goyal.run.epochs // 90
    assert goyal.schedule.at == [30 * scale, 60 * scale, 80 * scale]
    assert goyal.schedule.warm_up == 5 * scale
    assert goyal.schedule.warm_up_start == goyal.optimizer.lr * 32 / goyal.batch.size


@pytest.mark.parametrize(
    ("name", "penalties"),
    [
        ("tf-cifar10", {0.004: ["local3.weight", "local4.weight"]}),  # wd * tf.nn.l2_loss
        (
            "caffe-lenet",
            {5e-4: [f"{n}.{kind}" for n in (0, 2, 5, 7) for kind in ("weight", "bias")]},
        ),
        ("dln-mlp", {0.0: ["1.weight", "3.weight"], 2 * 0.0001: ["1.weight", "3.weight"]}),
        ("dln-sum", {0.0: ["1.weight", "3.weight"], 20 * 2 * 0.0001: ["1.weight", "3.weight"]}),
        ("ng", {1 / NUM_TRAIN: ["1.weight", "3.weight"]}),
        ("tf-mnist-beginners", {}),
        ("dln-logistic", {}),
    ],
)
def test_penalties_have_the_constants_of_the_originals_and_hold_the_same_weights(
    name: str, penalties: dict[float, list[str]]
) -> None:
    setup = read_shipped(f"{name}-digits")
    terms = list(setup.objective.penalty or ())
    result = {
        term.strength: sorted(ab.penalties.select_parameters(term, setup.model)) for term in terms
    }
    assert result == {strength: sorted(names) for strength, names in penalties.items()}


def test_caffes_biases_move_at_twice_the_rate_of_its_weights() -> None:
    setup = read_shipped("caffe-lenet-digits")
    names = {id(p): name for name, p in setup.model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"] for group in setup.optimizer.param_groups for p in group["params"]
    }
    assert len(rates) == 8
    assert rates == {name: 0.02 if "bias" in name else 0.01 for name in rates}


@pytest.mark.slow
@pytest.mark.skipif(not Path(DEBIAN).is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.parametrize(
    ("name", "sizes", "num_updates"),
    [
        ("tf-mnist-beginners", (50_000, 10_000), 1000),
        ("dln-logistic", (50_000, 10_000), 83 * 100),
        ("dln-mlp", (50_000, 10_000), 2500 * 20),
        ("caffe-lenet", (60_000, 0), 10_312),
    ],
)
def test_the_parts_and_updates_of_a_recipe_are_those_of_its_head(
    name: str, sizes: tuple[int, int], num_updates: int
) -> None:
    setup = read_shipped(name)
    assert (len(setup.splits.train), len(setup.splits.validation)) == sizes
    assert len(setup.splits.held_out) == 10_000
    assert setup.order.num_steps(setup.recipe.run.epochs) == num_updates


def test_numbers_that_follow_from_the_number_of_digits_are_right() -> None:
    ng = read_shipped("ng-digits")
    assert len(ng.splits.train) == NUM_TRAIN
    assert [term.strength for term in ng.objective.penalty or ()] == [1 / NUM_TRAIN]
    assert read_shipped("tf-mnist-beginners-digits").order.num_steps(70) == 1006  # of 100 each
    assert read_shipped("dln-mlp-digits").order.num_steps(141) == 10_011


def test_the_rate_of_goyals_recipe_warms_up_and_drops() -> None:
    setup = read_shipped("goyal-digits")
    epoch = NUM_TRAIN
    rates = [setup.schedule(round(epoch * e)) for e in (0, 2.5, 5, 8.99, 9, 18, 24, 27)]
    expected = [0.0125, (0.0125 + 0.1) / 2, 0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert setup.objective.grain == 32
    spared = [name for name, p in setup.model.named_parameters() if p.ndim == 1]
    contents = [name for name in dict(setup.model.named_parameters()) if name not in spared]
    (penalty,) = setup.objective.penalty or ()
    assert sorted(ab.penalties.select_parameters(penalty, setup.model)) == sorted(contents)


def weights_after(name: str, *changes: str) -> torch.Tensor:
    """All weights after one epoch in float64."""
    setup = read_shipped(name, "run.epochs=1", "run.dtype=float64", *changes)
    losses(setup)
    return torch.cat([p.detach().flatten() for p in setup.model.parameters()])


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
