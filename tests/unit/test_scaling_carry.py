"""A recipe rescale_recipe to another batch size: which keys change, and to what.

Expected numbers are written out from the table of the rules; k = 4 throughout, unless said.
"""

import math
from typing import Any

import pytest
from torch import nn

from anybatch.recipe.files import fingerprint_recipe
from anybatch.recipe.scaling import Rule, ScaledRecipe, rescale
from command_line import recipe

OLD, NEW, K = 64, 256, 4

WARM = {"schedule.warm_up": 1000, "schedule.warm_up_start": 0.1}
COSINE = {"schedule.name": "cosine", "schedule.examples": 9000, "schedule.end": 0.01}
L2 = {"objective.penalty": [{"kind": "L2", "strength": 0.01}]}
ADAM = {"betas": [0.98, 0.999], "eps": 1e-6}


def rescale_recipe(rule: Rule = "auto", size: int = NEW, **keys: Any) -> ScaledRecipe:
    return rescale(recipe(**{"batch.size": OLD} | keys), batch_size=size, rule=rule)


def optimizer(name: str, **args: Any) -> dict[str, Any]:
    return {"optimizer.name": name, "optimizer.args": args}


def check(result: ScaledRecipe, wanted: dict[str, Any]) -> None:
    """Exactly these keys have changed, to these numbers up to rounding."""
    values = {change.key: change.new for change in result.changes}
    assert values.pop("batch.size") == result.recipe.batch.size
    assert values.pop("order.args.sizes", None) == wanted.get("order.args.sizes")
    numbers = {key: value for key, value in wanted.items() if key != "order.args.sizes"}
    assert values == {key: pytest.approx(value, rel=1e-12) for key, value in numbers.items()}
    for change in result.changes:
        assert change.why
        where: Any = result.recipe.model_dump()
        for part in change.key.split("."):
            where = where[int(part)] if part.isdigit() else where[part]
        assert where == change.new


LR = 0.5  # of the small recipe
EVERY = WARM | COSINE | {"average.decay": 0.99, "optimizer.clip_norm": 2.0} | L2
TABLE: dict[str, tuple[Rule, dict[str, Any], dict[str, Any]]] = {
    "linear": (
        "auto",
        optimizer("sgd", momentum=0.9, weight_decay=0.1) | EVERY,
        {"optimizer.lr": 2.0, "schedule.end": 0.04, "average.decay": 0.99**4},
    ),
    "linear under sum": (
        "auto",
        optimizer("sgd", momentum=0.9, weight_decay=0.1) | EVERY | {"objective.reduction": "sum"},
        {
            "schedule.warm_up_start": 0.025,
            "optimizer.args.weight_decay": 0.4,
            "objective.penalty.0.strength": 0.04,
            "optimizer.clip_norm": 8.0,
            "average.decay": 0.99**4,
        },
    ),
    "half-life": (
        "half-life",
        optimizer("sgd", momentum=0.9) | WARM,
        {
            "optimizer.lr": 2.0 * 3.439,  # (1 - 0.9^4) / (1 - 0.9)
            "optimizer.args.momentum": 0.6561,
            "schedule.warm_up_start": 0.3439,
        },
    ),
    "half-life of a group": (
        "half-life",
        optimizer("sgd", momentum=0.9)
        | {"optimizer.groups": [{"on": ["*"], "lr_factor": 2.0, "momentum": 0.0}]},
        {
            "optimizer.lr": 2.0 * 3.439,
            "optimizer.args.momentum": 0.6561,
            "optimizer.groups.0.lr_factor": 2.0 / 3.439,
        },
    ),
    "sqrt": (
        "auto",
        optimizer("adam", **ADAM, weight_decay=0.1) | EVERY,
        {
            "optimizer.lr": 1.0,
            "schedule.end": 0.02,
            "schedule.warm_up_start": 0.2,
            "optimizer.args.betas": [0.98**4, 0.999**4],
            "optimizer.args.eps": 5e-7,
            "optimizer.clip_norm": 1.0,
            "average.decay": 0.99**4,
        },
    ),
    "sqrt under sum": (
        "auto",
        optimizer("adam", **ADAM, weight_decay=0.1) | L2 | {"objective.reduction": "sum"},
        {
            "optimizer.lr": 1.0,
            "optimizer.args.betas": [0.98**4, 0.999**4],
            "optimizer.args.eps": 2e-6,
            "optimizer.args.weight_decay": 0.4,
            "objective.penalty.0.strength": 0.04,
        },
    ),
    "its own defaults": (
        "auto",
        optimizer("adamw"),
        {
            "optimizer.lr": 1.0,
            "optimizer.args.betas": [0.9**4, 0.999**4],
            "optimizer.args.eps": 5e-9,
            "optimizer.args.weight_decay": 0.02,
        },
    ),
    "decoupled, of adam": (
        "auto",
        optimizer("adam", **ADAM, weight_decay=0.1, decoupled_weight_decay=True),
        {
            "optimizer.lr": 1.0,
            "optimizer.args.betas": [0.98**4, 0.999**4],
            "optimizer.args.eps": 5e-7,
            "optimizer.args.weight_decay": 0.2,
        },
    ),
    "decoupled, at a fixed rate": (
        "none",
        optimizer("adamw", **ADAM) | {"average.decay": 0.99},
        {"optimizer.args.weight_decay": 0.04, "average.decay": 0.99**4},
    ),
    "decoupled, at a linear rate": ("linear", optimizer("adamw", **ADAM), {"optimizer.lr": 2.0}),
    "decoupled, of a group": (
        "none",
        optimizer("adamw") | {"optimizer.groups": [{"on": ["*"], "weight_decay": 0.3}]},
        {"optimizer.args.weight_decay": 0.04, "optimizer.groups.0.weight_decay": 1.2},
    ),
    "rmsprop": (
        "auto",
        optimizer("rmsprop", alpha=0.98, eps=1e-4),
        {
            "optimizer.lr": 1.0,
            "optimizer.args.alpha": 0.98**4,
            "optimizer.args.eps": 5e-5,
        },
    ),
    "adagrad": (
        "auto",
        optimizer("adagrad", eps=1e-3, initial_accumulator_value=0.16, lr_decay=1e-4)
        | {"optimizer.clip_norm": 2.0},
        {
            "optimizer.args.eps": 2.5e-4,
            "optimizer.args.initial_accumulator_value": 0.01,
            "optimizer.args.lr_decay": 4e-4,
            "optimizer.clip_norm": 1.0,
        },
    ),
    "adagrad under sqrt": (
        "sqrt",
        optimizer("adagrad", eps=1e-3, initial_accumulator_value=0.16),
        {
            "optimizer.lr": 1.0,
            "optimizer.args.eps": 5e-4,
            "optimizer.args.initial_accumulator_value": 0.04,
        },
    ),
    "caffe": ("auto", optimizer("caffe_sgd", momentum=0.9), {"optimizer.lr": 2.0}),
    "caffe, half-life": (
        "half-life",
        optimizer("caffe_sgd", momentum=0.9),
        {"optimizer.lr": 2.0 * 3.439, "optimizer.args.momentum": 0.6561},
    ),
    "another's optimiser": (
        "none",
        optimizer("mine:optimizer", momentum=0.9) | EVERY,
        {"average.decay": 0.99**4},
    ),
    "sqrt of sgd, a control": ("sqrt", optimizer("sgd", momentum=0.9), {"optimizer.lr": 1.0}),
    "nothing of sgd, a control": (
        "none",
        optimizer("sgd", momentum=0.9) | EVERY,
        {"average.decay": 0.99**4},
    ),
    "groups of losses": (
        "auto",
        {"objective.reduction": {"name": "group_dro", "eta": 0.1}},
        {"optimizer.lr": 2.0, "objective.reduction.eta": 0.4},
    ),
    "windows of batches": (
        "none",
        {"order.name": "by_length"},
        {"order.args.window": 12},  # of 50
    ),
    "sizes that grow": (
        "auto",
        {"order.name": "growing", "order.args": {"sizes": [[5000, 96], [9000, 128]]}}
        | {"batch.last": "carry"},
        {"optimizer.lr": 2.0, "order.args.sizes": [[5000, 384], [9000, 512]]},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_exactly_these_keys_change(case: str) -> None:
    rule, keys, wanted = TABLE[case]
    check(rescale_recipe(rule, **keys), wanted)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sgd", "linear"),
        ("caffe_sgd", "linear"),
        ("adam", "sqrt"),
        ("adamw", "sqrt"),
        ("rmsprop", "sqrt"),
        ("adagrad", "adagrad"),
    ],
)
def test_auto_takes_the_optimisers_own_rule_and_says_which(name: str, rule: str) -> None:
    assert rescale_recipe(**optimizer(name)).rule == rule


def test_at_its_own_size_nothing_changes() -> None:
    result = rescale_recipe(size=OLD, **optimizer("adamw") | EVERY)
    assert (result.changes, result.warnings) == ([], [])
    assert result.recipe == recipe(**{"batch.size": OLD} | optimizer("adamw") | EVERY)


def test_what_is_counted_in_examples_stays_and_so_does_what_is_no_matter_of_size() -> None:
    stated = recipe(
        **{"batch.size": OLD, "batch.micro_batch": 16, "run.epochs": 7, "objective.grain": 32},
        **{"schedule.name": "step", "schedule.at": [900, 1900], "schedule.factor": 0.3},
        **{"schedule.warm_up": 300, "schedule.warm_up_start": 0.1, "run.checkpoint_every": 5},
        **{"optimizer.clip_examples": 1.0},
    )
    before, after = stated.model_dump(), rescale(stated, batch_size=NEW).recipe.model_dump()
    assert after["optimizer"].pop("lr") == K * before["optimizer"].pop("lr")
    assert (before["batch"].pop("size"), after["batch"].pop("size")) == (OLD, NEW)
    assert after == before


def test_the_recipe_that_is_given_stays_as_it_was() -> None:
    stated = recipe(**{"batch.size": OLD} | optimizer("adamw", betas=[0.9, 0.99]) | EVERY)
    before = fingerprint_recipe(stated)
    rescale(stated, batch_size=NEW)
    assert fingerprint_recipe(stated) == before


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw", "adagrad"])
def test_in_two_steps_is_in_one(name: str) -> None:
    stated = recipe(**{"batch.size": OLD} | optimizer(name) | {"average.decay": 0.9})
    middle = rescale(stated, batch_size=96).recipe
    twice, once = (rescale(r, batch_size=NEW).recipe.model_dump() for r in (middle, stated))
    for key in ("lr", "args"):
        _near(twice["optimizer"][key], once["optimizer"][key])
    _near(twice["average"], once["average"])


def _near(result: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert result.keys() == wanted.keys()
        for key in wanted:
            _near(result[key], wanted[key])
    else:
        assert result == (wanted if isinstance(wanted, bool) else pytest.approx(wanted, rel=1e-12))


def test_a_warm_up_starts_from_the_rate_of_before_and_never_above_its_end() -> None:
    start = {"schedule.warm_up": 1000, "schedule.warm_up_start": LR}  # idle at the size of before
    up = rescale_recipe(**start).recipe
    assert (up.schedule.warm_up_start, up.optimizer.lr) == (LR, 4 * LR)
    down = rescale_recipe(size=OLD // 4, **start).recipe
    assert (down.schedule.warm_up_start, down.optimizer.lr) == (LR / 4, LR / 4)


def test_numbers_of_a_reference_size_are_carried_from_there() -> None:
    keys = {"batch.size": 9, "batch.reference_size": OLD, "batch.scaling": "sqrt"}
    result = rescale(recipe(**keys), batch_size=NEW)
    assert (result.rule, result.recipe.optimizer.lr) == ("sqrt", 2 * LR)
    assert result.recipe.batch == recipe(**{"batch.size": NEW}).batch
    assert rescale(recipe(**keys), batch_size=NEW, rule="linear").recipe.optimizer.lr == 4 * LR
    at_home = rescale(recipe(**keys), batch_size=OLD)
    assert at_home.changes == []
    assert at_home.recipe.batch.size == OLD


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))


def test_the_grain_of_batch_normalisation_stays_that_of_before() -> None:
    stated = recipe(**{"batch.size": OLD})
    up = rescale(stated, batch_size=NEW, model=norms())
    assert up.recipe.objective.grain == OLD
    down = rescale(stated, batch_size=16, model=norms())
    assert down.recipe.objective.grain is None
    assert any("statistics from 16 examples in place of 64" in w for w in down.warnings)
    named = recipe(**{"batch.size": OLD, "objective.grain": 32})
    assert rescale(named, batch_size=NEW, model=norms()).recipe.objective.grain == 32
    assert rescale(stated, batch_size=NEW, model=nn.Linear(64, 10)).recipe.objective.grain is None


def test_a_rate_that_k_takes_back_under_sum_keeps_its_bits() -> None:
    for size in (3, 49, 77, 1000):  # 49 (1 / 49) is not 1
        result = rescale_recipe(size=size, **{"objective.reduction": "sum", "batch.size": 1})
        assert result.recipe.optimizer.lr == LR


def test_the_square_root_of_k_need_not_be_whole() -> None:
    result = rescale_recipe(size=96, **optimizer("adam"))
    assert result.recipe.optimizer.lr == LR * math.sqrt(1.5)
