"""Objects of a recipe: each name becomes what it says, and nothing is passed over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anybatch import reductions
from anybatch.errors import AnybatchError, RecipeError
from anybatch.objective import Objective
from anybatch.penalties import L1, L2
from anybatch.recipe.build import Setup, build
from anybatch.recipe.names import locate_user_code, suggest_name
from anybatch.recipe.objectives import build_objective
from anybatch.recipe.schema import ObjectiveSection
from command_line import recipe


def make_setup(**keys: Any) -> Setup:
    """Build a small recipe."""
    return build(recipe(**keys), allow_code=False)


def objective(**keys: Any) -> Objective:
    """Return the objective of a section."""
    section = ObjectiveSection.model_validate({"loss": "cross_entropy"} | keys)
    return build_objective(section, allow_code=False)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mean", reductions.Mean()),
        ("sum", reductions.Sum()),
        ("max", reductions.Max()),
        ({"name": "mean"}, reductions.Mean()),
        ({"name": "sum", "scale": 0.5}, 0.5 * reductions.Sum()),
        ({"name": "mean", "scale": 2}, 2 * reductions.Mean()),
        ({"name": "top_fraction", "q": 0.2}, reductions.TopFraction(0.2)),
        ({"name": "tilted", "t": 2.0, "scale": 0.1}, 0.1 * reductions.Tilted(2.0)),
        ({"name": "group_dro", "eta": 0.01}, reductions.GroupDRO(0.01)),
    ],
)
def test_a_reduction_is_the_one_named(setting: Any, expected: reductions.Reduction) -> None:
    assert objective(reduction=setting).reductions == {"data": expected}


def test_terms_have_a_reduction_each() -> None:
    result = objective(reduction={"fit": "mean", "size": {"name": "sum", "scale": 0.1}})
    expected = {"fit": reductions.Mean(), "size": 0.1 * reductions.Sum()}
    assert result.reductions == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("meen", "no reduction 'meen'; did you mean 'mean'"),
        ({"name": "tilted"}, r"cannot be called as Tilted\(\): missing a required argument: 't'"),
        ({"name": "tilted", "q": 1.0}, "objective.reduction.q: no such argument; expected one of"),
        ({"name": "tilted", "t": 0.0}, r"Tilted has t=0\.0\. It must be finite and not 0"),
        ({"name": "mean", "scale": "x"}, "objective.reduction.scale: expected a number, got 'x'"),
        ({"name": "mean", "scale": True}, "objective.reduction.scale: expected a number, got True"),
        ({"nam": "tilted", "t": 2.0}, "Without a name, each key is a term of the loss"),
        ({"fit": 3}, r"objective.reduction.fit: expected a name such as 'mean'.* got 3"),
        ({"fit": {"scale": 1.0}}, "objective.reduction.fit: expected a name such as 'mean'"),
        ({}, "Give at least one term a reduction"),
    ],
)
def test_a_reduction_that_is_none_is_refused(setting: Any, message: str) -> None:
    with pytest.raises(AnybatchError, match=message):
        objective(reduction=setting)


def test_penalties_are_the_ones_named_on_the_parameters_named() -> None:
    terms = [
        {"kind": "L2", "strength": 0.1},
        {"kind": "L1", "strength": 0.2, "on": ["*.bias"], "name": "sparse"},
    ]
    result = objective(penalty=terms).penalty
    assert result is not None
    assert list(result) == [L2(0.1), L1(0.2, ["*.bias"], "sparse")]
    with pytest.raises(AnybatchError, match="which matches no trainable parameter"):
        make_setup(**{"objective.penalty": [terms[0] | {"on": ["*.wieght"]}]})


def test_an_optimizer_is_the_one_named_with_its_arguments() -> None:
    keys = {"optimizer.name": "adamw", "optimizer.args": {"betas": [0.8, 0.9], "eps": 1e-6}}
    optimizer = make_setup(**keys).optimizer
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": 0.1}, "optimizer.args.lr: the rate is stated in optimizer.lr"),
        ({"params": []}, "optimizer.args.params: the parameters are all of the model's"),
        ({"momentun": 0.9}, "optimizer.args.momentun: no such argument; did you mean 'momentum'"),
        ({"momentum": "x"}, r"optimizer.args.momentum = 'x' is text. It should be a number"),
        ({"momentum": -1.0}, "SGD refused them: ValueError: Invalid momentum value: -1.0"),
        ({"nesterov": True}, "SGD refused them: ValueError: Nesterov momentum requires"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_are_refused(
    args: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_setup(**{"optimizer.args": args})


@pytest.mark.parametrize(
    ("keys", "rates"),
    [
        ({}, [0.5, 0.5, 0.5]),
        ({"name": "step", "every": 100, "factor": 0.5}, [0.5, 0.5, 0.125]),
        ({"name": "step", "at": [50, 200]}, [0.5, 0.05, 0.005]),
        ({"warm_up": 200}, [0.0, 0.125, 0.5]),
        ({"warm_up": 100, "warm_up_start": 0.1}, [0.1, 0.3, 0.5]),
        ({"name": "step", "at": [200], "warm_up": 100}, [0.0, 0.25, 0.05]),
        ({"name": "inverse", "gamma": 0.5, "power": 1.0, "every": 25}, [0.5, 0.25, 0.1]),
        ({"name": "exponential", "factor": 0.25, "every": 100}, [0.5, 0.25, 0.03125]),
        (
            {"name": "exponential", "factor": 0.25, "every": 100, "staircase": True},
            [0.5, 0.5, 0.03125],
        ),
        ({"name": "cosine", "examples": 100}, [0.5, 0.25, 0.0]),
        ({"name": "cosine", "examples": 100, "end": 0.1, "warm_up": 100}, [0.0, 0.15, 0.1]),
    ],
)
def test_a_schedule_gives_the_rates_that_it_states(
    keys: dict[str, Any], rates: list[float]
) -> None:
    schedule = make_setup(**{f"schedule.{key}": value for key, value in keys.items()}).schedule
    assert [schedule(examples) for examples in (0, 50, 200)] == pytest.approx(rates, rel=1e-12)


BIASES_TWICE = {"on": ["*bias"], "lr_factor": 2.0, "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
def test_groups_of_parameters_have_arguments_of_their_own(name: str) -> None:
    groups = [BIASES_TWICE, {"on": ["1.*"], "lr_factor": 0.0}, {"on": ["*"], "weight_decay": 0.1}]
    mlp = {"model.name": "mlp", "optimizer.name": name, "optimizer.args": {"weight_decay": 0.3}}
    result = make_setup(**mlp, **{"optimizer.groups": groups})
    names = {id(p): name for name, p in result.model.named_parameters()}
    rows = [
        ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in result.optimizer.param_groups
    ]
    assert rows == [
        ([], 0.5, 0.3),
        (["1.bias", "3.bias"], 1.0, 0.0),
        (["1.weight"], 0.0, 0.3),
        (["3.weight"], 0.5, 0.1),
    ]


@pytest.mark.parametrize(
    ("keys", "is_fused"),
    [
        ({"optimizer.name": "sgd"}, True),
        ({"optimizer.name": "adam"}, True),
        ({"optimizer.name": "adamw", "optimizer.groups": [{"on": ["*bias"]}]}, True),
        ({"optimizer.name": "rmsprop"}, None),  # torch has no such kernel
        ({"run.bitwise": True, "run.threads": 1, "objective.grain": 8}, None),
        ({"run.shard": True}, None),
        ({"run.compile": True}, None),
        ({"optimizer.args": {"fused": False}}, False),
        ({"optimizer.args": {"foreach": True}}, None),
    ],
)
def test_an_optimizer_is_fused_where_nothing_speaks_against_it(
    keys: dict[str, Any], is_fused: bool | None
) -> None:
    groups = make_setup(**keys).optimizer.param_groups
    assert groups
    for group in groups:
        assert group.get("fused") is is_fused


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"on": ["*.wieght"]}], r"groups.0.on: '\*.wieght' matches no .* 1.weight, 1.bias"),
        ([{"on": []}], r"groups.0.on = \[\] leaves this group empty"),
        ([{"on": ["*"]}, BIASES_TWICE], "groups.1.on = .* leaves this group empty: the first"),
        (
            [BIASES_TWICE | {"lr": 1.0}],
            "0.lr: a group has no such key. Set lr_factor instead",
        ),
        (
            [BIASES_TWICE | {"params": []}],
            "0.params: a group has no such key. Set on instead",
        ),
        ([BIASES_TWICE | {"momentun": 0.9}], "0.momentun: no such .* did you mean 'momentum'"),
        ([BIASES_TWICE | {"momentum": -1.0}], "optimizer.groups.0 = .* Invalid momentum"),
        ([BIASES_TWICE | {"weight_decay": "x"}], "groups.0.weight_decay = 'x' is text"),
    ],
)
def test_groups_that_hold_nothing_or_that_torch_refuses_are_refused(
    groups: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_setup(**{"optimizer.groups": groups})


def test_a_mistake_in_args_is_not_blamed_on_a_group() -> None:
    keys = {"optimizer.args": {"momentum": -1.0}, "optimizer.groups": [BIASES_TWICE]}
    with pytest.raises(RecipeError, match=r"optimizer.args = .* Invalid momentum"):
        make_setup(**keys)


def test_a_group_keeps_what_it_does_not_change() -> None:
    keys = {"optimizer.args": {"momentum": 0.9}, "optimizer.groups": [{"on": ["*bias"]}]}
    plain, bias = make_setup(**keys).optimizer.param_groups
    assert (bias["momentum"], bias["lr"]) == (plain["momentum"], plain["lr"]) == (0.9, 0.5)
    nesterov = {"optimizer.groups": [{"on": ["*bias"], "nesterov": True}]}
    assert make_setup(**keys | nesterov).optimizer.param_groups[1]["nesterov"] is True


def test_an_average_is_made_where_one_is_asked_for() -> None:
    assert make_setup().average is None
    result = make_setup(**{"average.decay": 0.9, "average.warm_up": True}).average
    assert result is not None
    assert (result.decay, result.warm_up) == (0.9, True)


def test_a_metric_to_stop_by_that_the_loss_does_not_give_is_refused() -> None:
    keys = {"stop.patience": 3, "stop.metric": "acuracy"}
    with pytest.raises(RecipeError, match="no 'acuracy'; did you mean 'accuracy'"):
        make_setup(**keys)
    for metric in ("loss", "accuracy"):
        assert make_setup(**keys | {"stop.metric": metric}).recipe.stop.metric == metric


def test_drops_out_of_order_are_refused() -> None:
    with pytest.raises(RecipeError, match="must be ascending"):
        make_setup(**{"schedule.name": "step", "schedule.at": [200, 100]})


def test_the_weights_belong_to_the_seed_and_the_data_do_not() -> None:
    first, again, other = make_setup(), make_setup(), make_setup(**{"run.seed": 1})
    weight = "1.weight"
    assert torch.equal(first.model.state_dict()[weight], again.model.state_dict()[weight])
    assert not torch.equal(first.model.state_dict()[weight], other.model.state_dict()[weight])
    assert torch.equal(first.data.inputs, other.data.inputs)
    assert torch.equal(first.splits.train, other.splits.train)


def test_building_leaves_the_global_generators_as_they_were() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    make_setup()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_float64_is_float64_from_the_file_on(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(30, 64))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=np.arange(30) % 10)
    keys = {"data.name": "npz", "data.args": {"path": str(tmp_path / "data.npz")}, "batch.size": 4}
    result = make_setup(**keys, **{"run.dtype": "float64"})
    np.testing.assert_array_equal(result.data.inputs.numpy(), inputs)
    assert {p.dtype for p in result.model.parameters()} == {torch.float64}
    narrow = make_setup(**keys)
    np.testing.assert_array_equal(narrow.data.inputs.numpy(), inputs.astype(np.float32))


def test_ids_are_those_of_the_whole_data_set() -> None:
    result = make_setup()
    ids = result.order.indices(0)
    assert set(ids.tolist()) <= set(result.splits.train.tolist())
    assert result.order.num_steps(1) == 6
    epoch = torch.cat([result.order.indices(step) for step in range(6)])
    assert torch.equal(epoch.sort().values, result.splits.train)


def test_every_device_but_those_here_is_refused() -> None:
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(RecipeError, match=f"run.device '{name}' cannot be used here"):
            make_setup(**{"run.device": name})


def test_the_nearest_name_is_offered_and_far_ones_are_listed() -> None:
    assert suggest_name("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert suggest_name("xyz", ["epochs", "seed"]) == "expected one of: epochs, seed."
    assert suggest_name("xyz", []) == "expected none."


def test_an_error_of_our_own_is_not_blamed_on_the_user() -> None:
    with pytest.raises(RecipeError, match="no such argument") as caught:
        make_setup(**{"model.args": {"clases": 3}})
    assert locate_user_code(caught.value) is None
