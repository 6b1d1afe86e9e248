"""Conditions of the rules: a recipe warns where one fails; what cannot be converted is refused.

Each warning has another recipe where the condition holds, and must be silent there.
"""

import re
from typing import Any

import pytest

from anybatch.errors import RecipeError
from anybatch.recipe.scaling import Rule, ScaledRecipe, rescale
from command_line import recipe

LR, OLD, NEW = 0.5, 64, 256
WARM = {"schedule.warm_up": 1000, "schedule.warm_up_start": 0.1}


def carry_recipe(rule: Rule = "auto", size: int = NEW, **keys: Any) -> ScaledRecipe:
    return rescale(recipe(**{"batch.size": OLD} | keys), batch_size=size, rule=rule)


def optimizer(name: str, **args: Any) -> dict[str, Any]:
    return {"optimizer.name": name, "optimizer.args": args}


WARNINGS: dict[str, tuple[Rule, int, dict[str, Any], str]] = {
    "warm-up": ("auto", NEW, {}, r"warm-up needed: .*warm_up_start = 0.5, the old rate"),
    "range": ("auto", 9000, {}, "beyond the known range: .* 9,000 examples, k = 140.625"),
    "ragged": ("auto", NEW, {}, r"a last batch of fewer than 256 examples has the rate"),
    "grain": ("auto", 16, {"objective.grain": 32}, "objective.grain = 32 is more than a batch"),
    "beta": (
        "auto",
        640,
        optimizer("adam"),
        r"betas = 0.9: k \(1 - beta\) = 1 is not below 1. .* beta\^k = 0.349",
    ),
    "clip": ("auto", NEW, {"optimizer.clip_norm": 1.0}, "clip_norm stays. That is right where"),
    "sqrt": ("sqrt", NEW, {}, "sqrt is no rule for sgd, whose own is linear. Use it only as a"),
    "linear": ("linear", NEW, optimizer("adam"), "linear is no rule for adam, whose own is sqrt"),
    "none": (
        "none",
        NEW,
        {},
        "none: rate, momentum, betas, epsilon and clip norm stay as they are",
    ),
    "caffe": (
        "auto",
        NEW,
        optimizer("caffe_sgd", momentum=0.9),
        r"its velocity contains the rate. .* optimizer.name = 'sgd' .* remark 2",
    ),
    "rmsprop": ("auto", NEW, optimizer("rmsprop", momentum=0.9), "momentum of RMSProp stays"),
    "average": (
        "auto",
        NEW,
        {"average.decay": 0.9, "average.warm_up": True},
        "average.warm_up counts updates",
    ),
    "code": ("none", NEW, optimizer("mine:opt"), "mine:opt: its own arguments stay"),
    "order": ("auto", NEW, {"order.name": "mine:order"}, "'mine:order' is code of yours"),
}
QUIET: dict[str, tuple[Rule, int, dict[str, Any]]] = {  # where the condition holds
    "warm-up": ("auto", NEW, WARM),
    "range": ("auto", 2048, {}),
    "ragged": ("auto", NEW, {"batch.last": "carry"}),
    "grain": ("auto", 32, {"objective.grain": 32}),
    "beta": ("auto", 639, optimizer("adam")),
    "clip": ("auto", NEW, optimizer("adam") | {"optimizer.clip_norm": 1.0}),
    "sqrt": ("sqrt", NEW, optimizer("adam")),
    "linear": ("linear", NEW, {}),
    "none": ("auto", NEW, {}),
    "caffe": ("auto", 32, optimizer("caffe_sgd")),  # a constant rate, and none to rise to
    "rmsprop": ("auto", NEW, optimizer("rmsprop")),
    "average": ("auto", NEW, {"average.decay": 0.9}),
    "code": ("none", NEW, optimizer("adam")),
    "order": ("auto", NEW, {}),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_where_a_condition_fails_it_warns_and_elsewhere_not(case: str) -> None:
    rule, size, keys, message = WARNINGS[case]
    messages = carry_recipe(rule, size, **keys).warnings
    assert [w for w in messages if re.search(message, w)], messages
    rule, size, keys = QUIET[case]
    words = message[:14]
    assert not [w for w in carry_recipe(rule, size, **keys).warnings if words in w]


def test_going_to_a_smaller_batch_needs_no_warm_up() -> None:
    result = carry_recipe(size=16)
    assert result.recipe.optimizer.lr == LR / 4
    assert not any("warm-up" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("size", "rule", "keys", "message"),
    [
        (0, "auto", {}, "batch_size = 0. Expected the number of examples of an update: an integer"),
        (-3, "auto", {}, "batch_size = -3. Expected"),
        (2.5, "auto", {}, "batch_size = 2.5. Expected"),
        (True, "auto", {}, "batch_size = True. Expected"),
        (10**400, "auto", {}, "an integer from 1 to 2,147,483,648"),
        (NEW, "auto", optimizer("adam", eps="x"), "args.eps: expected a number, got 'x'"),
        (NEW, "auto", optimizer("adam", betas=[0.9, True]), r"args.betas: .* got \[0.9, True\]"),
        (NEW, "auto", optimizer("adam", betas=[-0.1, 0.9]), "is -0.1. It should be from 0 to 1"),
        (NEW, "auto", optimizer("adamw", weight_decay={}), r"weight_decay: expected .* got \{\}"),
        (NEW, "half-life", optimizer("sgd", momentum="x"), "momentum: expected a number, got 'x'"),
        (NEW, "half-life", optimizer("sgd", momentum=1.0), "from 0 to below 1, got 1"),
        (
            NEW,
            "half-life",
            {"optimizer.groups": [{"on": ["*"], "momentum": "x"}]},
            "optimizer.groups.0.momentum: expected a number, got 'x'",
        ),
        (
            NEW,
            "auto",
            {"objective.reduction": {"name": "group_dro", "eta": "x"}},
            "objective.reduction.eta: expected a number",
        ),
        (
            NEW,
            "auto",
            {"order.name": "by_length", "order.args": {"window": 0.5}},
            "order.args.window: expected an integer of at least 1, got 0.5",
        ),
        (
            NEW,
            "auto",
            {"order.name": "growing", "order.args": {"sizes": [7]}},
            r"order.args.sizes: expected pairs \[examples, size\], got 7",
        ),
        (2**31, "linear", {"optimizer.lr": 1e305}, "optimizer.lr: expected a finite number"),
        (NEW, "sqr", {}, "there is no rule 'sqr'; did you mean 'sqrt'"),
        (NEW, "auto", optimizer("nadam"), "'nadam' has no rule that is known.* --rule none"),
        (
            NEW,
            "linear",
            optimizer("mine:opt"),
            "'mine:opt' is code of yours. Rules are known for",
        ),
        (NEW, "half-life", optimizer("adam"), "half-life is a rule for the momentum of sgd"),
        (NEW, "auto", {"objective.reduction": "max"}, "'max' is another objective .* is larger"),
        (
            NEW,
            "none",
            {"objective.reduction": {"name": "top_fraction", "q": 0.1}},
            "'top_fraction' is another objective at another batch size: the largest of more",
        ),
        (
            NEW,
            "auto",
            {"objective.reduction": {"a": "mean", "b": {"name": "tilted", "t": 1.0}}},
            "'tilted' is another objective at another batch size: the logarithm",
        ),
        (NEW, "auto", {"objective.reduction": "mine:r"}, "'mine:r': nobody knows how it depends"),
        (
            NEW,
            "auto",
            {"objective.reduction": {"a": "mean", "b": "sum"}},
            "are mean, sum. One is summed, and would outgrow the others",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(
    size: Any, rule: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        carry_recipe(rule, size, **keys)
