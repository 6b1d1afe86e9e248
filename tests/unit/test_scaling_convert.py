"""Mean and Sum of a recipe make the same path, for each optimiser, and no conversion can be left
out.

The oracle is a loop of plain autograd under Mean: the mean of the losses of whole batches,
penalties written out, the gradient shortened to the clip norm by hand, torch's optimiser. It shares
the recipe's model, order and schedule, and neither the library's reductions nor its penalties,
clipping or conversion. All is float64, B = 100: no power of two, by which division would be exact.
Two orders of summation round to 1e-16 an update; 1e-12 over 100 updates leaves two digits.
"""

import copy
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anybatch as ab
from anybatch.errors import RecipeError
from anybatch.recipe.build import build
from anybatch.recipe.files import find_recipe, parse_recipe, read_recipe
from anybatch.recipe.scaling import convert
from anybatch.recipe.schema import Recipe
from command_line import recipe

BATCH, NUM_UPDATES, TOLERANCE = 100, 100, 1e-12
LEFT_OUT = 1e-6  # a path without a conversion is at least so far away

COSINE = {"name": "cosine", "examples": 20_000, "end": 0.01, "warm_up": 2_000} | {
    "warm_up_start": 0.02
}
L2 = {"kind": "L2", "strength": 0.01}
L1 = {"kind": "L1", "strength": 0.001, "on": ["*.bias"]}
GROUP = {"on": ["*.bias"], "lr_factor": 2.0, "weight_decay": 0.3}

CASES: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.3, "args": {"weight_decay": 0.02}, "clip_norm": 0.4},
    "momentum": {"name": "sgd", "lr": 0.1, "args": {"momentum": 0.9}, "clip_norm": 0.4},
    "nesterov": {
        "name": "sgd",
        "lr": 0.1,
        "args": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        "groups": [GROUP],
        "clip_norm": 0.4,
    },
    "caffe": {"name": "caffe_sgd", "lr": 0.1, "args": {"momentum": 0.9, "weight_decay": 0.02}},
    "adagrad": {
        "name": "adagrad",
        "lr": 0.05,
        "args": {"eps": 0.05, "initial_accumulator_value": 0.01, "weight_decay": 0.02},
        "clip_norm": 0.4,
    },
    "rmsprop": {
        "name": "rmsprop",
        "lr": 0.01,
        "args": {"eps": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.02},
        "clip_norm": 0.4,
    },
    "adam": {
        "name": "adam",
        "lr": 0.01,
        "args": {"eps": 0.01, "weight_decay": 0.02, "amsgrad": True},
        "clip_norm": 0.4,
    },
    "adam, its own epsilon": {"name": "adam", "lr": 0.01},
    "adam, decoupled": {
        "name": "adam",
        "lr": 0.01,
        "args": {"eps": 0.01, "weight_decay": 0.5, "decoupled_weight_decay": True},
    },
    "adamw": {
        "name": "adamw",
        "lr": 0.01,
        "args": {"eps": 0.01, "weight_decay": 0.5},
        "groups": [GROUP | {"eps": 0.02}],
        "clip_norm": 0.4,
    },
}
DIVIDED = {"optimizer.args.eps", "optimizer.clip_norm", "optimizer.args.weight_decay"}
PENALTIES = {"objective.penalty.0.strength", "objective.penalty.1.strength"}
RATES = {"optimizer.lr", "schedule.end", "schedule.warm_up_start"}
CONVERTED: dict[str, set[str]] = {  # written by hand, from how each optimiser uses its gradient
    "sgd": RATES | {"optimizer.args.weight_decay", "optimizer.clip_norm"},
    "momentum": RATES | {"optimizer.clip_norm"},
    "nesterov": RATES
    | {"optimizer.args.weight_decay", "optimizer.clip_norm", "optimizer.groups.0.weight_decay"},
    "caffe": RATES | {"optimizer.args.weight_decay"},
    "adagrad": DIVIDED | {"optimizer.args.initial_accumulator_value"},
    "rmsprop": DIVIDED,
    "adam": DIVIDED,
    "adam, its own epsilon": {"optimizer.args.eps"},
    "adam, decoupled": {"optimizer.args.eps"},
    "adamw": {"optimizer.args.eps", "optimizer.clip_norm", "optimizer.groups.0.eps"},
}
EACH = [(name, key) for name in CASES for key in sorted(CONVERTED[name] | PENALTIES)]
TINY = {("adam, its own epsilon", "optimizer.args.eps")}  # 1e-8 beside gradients of 1e-2


@cache
def make_recipe(name: str) -> Recipe:
    """Return the recipe of a case, under Mean."""
    keys: dict[str, Any] = {
        "run.dtype": "float64",
        "batch.size": BATCH,
        "batch.last": "drop",
        "objective.penalty": [L2, L1],
        "optimizer.args": {},
    }
    keys |= {f"optimizer.{key}": value for key, value in CASES[name].items()}
    scale = CASES[name]["lr"] / 0.3
    schedule = {k: v * scale if k in ("end", "warm_up_start") else v for k, v in COSINE.items()}
    return recipe(**keys, **{f"schedule.{key}": value for key, value in schedule.items()})


def train_by_library(result: Recipe) -> Tensor:
    """Return the weights after 100 updates of the library."""
    setup = build(result, allow_code=False)
    updates = ab.steps(
        setup.model,
        setup.objective,
        setup.optimizer,
        setup.data.columns,
        order=setup.order,
        epochs=NUM_UPDATES,
        clip=setup.clip,
        schedule=setup.schedule,
    )
    assert sum(1 for _ in islice(updates, NUM_UPDATES)) == NUM_UPDATES
    return weights_of(setup.model)


@cache
def by_hand(name: str) -> tuple[Tensor, int]:
    """Return the weights after 100 updates written out under Mean, and how many were clipped."""
    result = make_recipe(name)
    setup, clip, num_clipped = build(result, allow_code=False), result.optimizer.clip_norm, 0
    inputs, targets = setup.data.columns
    factors = [group["lr"] / result.optimizer.lr for group in setup.optimizer.param_groups]
    for step in range(NUM_UPDATES):
        ids = setup.order.indices(step)
        assert len(ids) == BATCH
        for group, factor in zip(setup.optimizer.param_groups, factors, strict=True):
            group["lr"] = factor * setup.schedule(step * BATCH)
        setup.optimizer.zero_grad()
        loss = F.cross_entropy(setup.model(inputs[ids]), targets[ids])
        weight, bias = (
            torch.cat([p.flatten() for p in setup.model.parameters() if (p.ndim > 1) == is_matrix])
            for is_matrix in (True, False)
        )
        (loss + 0.01 / 2 * weight.square().sum() + 0.001 * bias.abs().sum()).backward()
        gradients = [p.grad for p in setup.model.parameters() if p.grad is not None]
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        if clip is not None and norm > clip:
            num_clipped += 1
            for gradient in gradients:
                gradient *= clip / norm
        setup.optimizer.step()
    return weights_of(setup.model), num_clipped


def weights_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(result: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((result - wanted).norm() / wanted.norm())


def without(name: str, key: str) -> Recipe:
    """Return the sum of a case, one conversion left out."""
    tree = convert(make_recipe(name), "sum").recipe.model_dump()
    before: Any = make_recipe(name).model_dump()
    here: Any = tree
    *path, last = key.split(".")
    for part in path:
        here, before = (x[int(part)] if part.isdigit() else x[part] for x in (here, before))
    if last in before:
        here[last] = before[last]
    else:
        del here[last]
    return parse_recipe(tree, "a test")


@pytest.mark.fast(3)
@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_loop_by_hand_and_some_updates_are_clipped(name: str) -> None:
    weights, num_clipped = by_hand(name)
    assert distance(train_by_library(make_recipe(name)), weights) <= TOLERANCE
    assert (num_clipped > 0) == (make_recipe(name).optimizer.clip_norm is not None)


@pytest.mark.fast(2)
@pytest.mark.parametrize("name", CASES)
def test_its_sum_follows_the_same_path(name: str) -> None:
    result = convert(make_recipe(name), "sum")
    assert result.recipe.objective.reduction == "sum"
    assert result.warnings == []
    assert distance(train_by_library(result.recipe), by_hand(name)[0]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_conversions_are_those_written_by_hand_and_no_others(name: str) -> None:
    keys = {change.key for change in convert(make_recipe(name), "sum").changes}
    assert keys == CONVERTED[name] | PENALTIES | {"objective.reduction"}


@pytest.mark.fast(5)
@pytest.mark.parametrize(("name", "key"), EACH)
def test_no_conversion_can_be_left_out(name: str, key: str) -> None:
    result = distance(train_by_library(without(name, key)), by_hand(name)[0])
    assert result > (1e3 * TOLERANCE if (name, key) in TINY else LEFT_OUT)


@pytest.mark.parametrize("name", ["adamw", "adam, decoupled"])
def test_decoupled_decay_is_none_of_the_gradient_and_must_not_be_converted(name: str) -> None:
    tree = convert(make_recipe(name), "sum").recipe.model_dump()
    tree["optimizer"]["args"]["weight_decay"] *= BATCH
    assert distance(train_by_library(parse_recipe(tree, "a test")), by_hand(name)[0]) > LEFT_OUT


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_where_it_was(name: str) -> None:
    there = convert(make_recipe(name), "sum").recipe
    back = convert(there, "mean").recipe.model_dump()
    before = make_recipe(name).model_dump()
    _close(back, before)
    assert convert(there, "sum").changes == []
    assert convert(there, "sum").recipe == there


def _close(result: Any, wanted: Any) -> None:
    """Equal, floats to the rounding of one product and one quotient; a default may be stated."""
    if isinstance(wanted, dict):
        for key in wanted:
            _close(result[key], wanted[key])
    elif isinstance(wanted, list):
        for a, b in zip(result, wanted, strict=True):
            _close(a, b)
    else:
        assert result == (pytest.approx(wanted, rel=1e-15) if isinstance(wanted, float) else wanted)


def test_the_recipe_that_is_given_stays_as_it_was() -> None:
    before = make_recipe("adamw").model_dump()
    rest = copy.deepcopy(before)
    convert(make_recipe("adamw"), "sum")
    assert make_recipe("adamw").model_dump() == rest


def test_a_scale_and_several_terms_stay() -> None:
    reduction = {"data": {"name": "mean", "scale": 0.5}, "router": "mean"}
    result = convert(recipe(**{"objective.reduction": reduction}), "sum")
    wanted = {"data": {"name": "sum", "scale": 0.5}, "router": "sum"}
    assert result.recipe.objective.reduction == wanted
    assert result.recipe.optimizer.lr == 0.5 / 256


def test_clip_examples_is_of_the_examples_own_gradient_and_stays() -> None:
    result = convert(recipe(**{"optimizer.clip_examples": 1.0}), "sum")
    assert result.recipe.optimizer.clip_examples == 1.0


def test_tokens_of_windows_count_each() -> None:
    result = convert(
        read_recipe(find_recipe("gpt-pydoc"), ["batch.size=10"]), "sum"
    ).recipe  # windows of 64
    assert result.optimizer.clip_norm == 640.0
    assert result.optimizer.args["eps"] == pytest.approx(6.4e-6)
    without = read_recipe(
        find_recipe("gpt-pydoc"), ["batch.size=10", "data.args={path = 'pydoc_topics'}"]
    )
    assert convert(without, "sum").recipe.optimizer.clip_norm == 1280.0  # windows of 128


def test_the_numbers_of_a_reference_size_are_converted_at_that_size() -> None:
    result = convert(recipe(**{"batch.reference_size": 64}), "sum").recipe
    assert result.optimizer.lr == 0.5 / 64
    assert (result.batch.size, result.batch.reference_size) == (256, 64)


def test_a_ragged_last_batch_is_warned_of() -> None:
    assert "a last batch of fewer" in convert(recipe(), "sum").warnings[0]
    assert convert(recipe(**{"batch.last": "carry"}), "sum").warnings == []


def test_code_that_may_count_is_warned_of() -> None:
    make_recipe = recipe(**{"objective.loss": "mine:loss", "batch.last": "drop"})
    assert "it counts each example once" in convert(make_recipe, "sum").warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.reduction": "max"}, "reduction is max. Only mean alone or sum alone"),
        ({"objective.reduction": {"a": "mean", "b": "sum"}}, "is mean and sum. Only mean"),
        ({"objective.reduction": {"name": "group_dro", "eta": 0.1}}, "is group_dro. Only mean"),
        ({"optimizer.name": "nadam"}, "'nadam': nobody knows .* known for sgd, caffe_sgd"),
        ({"optimizer.name": "mine:optimizer"}, "'mine:optimizer': nobody knows"),
        ({"data.args": {"weights": "w"}}, "weights = 'w': the weights of a batch add up"),
        ({"order.name": "growing", "order.args": {"sizes": [[9, 512]]}}, "batches differ in size"),
        (
            {"objective.loss": "token_cross_entropy", "data.name": "lines"},
            "batches differ in their number of tokens, and no constant converts the mean",
        ),
    ],
)
def test_what_no_constant_converts_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        convert(recipe(**changes), "sum")


def test_weights_that_examples_are_drawn_by_do_not_count() -> None:
    changes = {"data.args": {"weights": "w"}, "order.name": "weighted", "batch.last": "carry"}
    assert convert(recipe(**changes), "sum").warnings == []


def test_another_reduction_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"reduction = 'max'\. Expected 'sum' or 'mean'"):
        convert(recipe(), "max")  # type: ignore[arg-type]
