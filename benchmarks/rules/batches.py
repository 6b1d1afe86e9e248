"""Rules for the learning rate and for AdamW's decay, from a batch of 32 to the full set.

Each rule is the one of `anybatch scale`. Two controls change the rate and leave the decay. A second
group of five seeds at the reference size shows how far apart two groups of equal runs are.
"""

from collections.abc import Mapping
from typing import Any

from anybatch.recipe.scaling import Rule, rescale
from anybatch.recipe.schema import Recipe
from rules.common import FULL, REFERENCE_SIZE, SEEDS, build_reference, round_figures, train_curve
from rules.data import keep_smaller
from rules.rates import reference_rate

__all__ = ["AGAIN", "RULES", "SIZES", "convert_recipe", "list_jobs", "run_job"]

SIZES = (*keep_smaller((256, 1024, 4096)), FULL)
AGAIN = tuple(seed + len(SEEDS) for seed in SEEDS)  # the second group
RULES: dict[str, dict[str, tuple[Rule, bool]]] = {  # rule of `rescale`; does decay follow it?
    "sgd": {
        "linear": ("linear", True),
        "half-life": ("half-life", True),
        "square root": ("sqrt", True),
        "none": ("none", True),
    },
    "adamw": {
        "rate as it is, decay k": ("none", True),
        "rate sqrt(k), decay sqrt(k)": ("sqrt", True),
        "rate k, decay as it is": ("linear", True),
        "rate sqrt(k), decay as it is": ("sqrt", False),
        "rate as it is, decay as it is": ("none", False),
    },
}


def list_jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the reference over ten seeds, and each rule at each size over five."""
    lr = {name: reference_rate(raw, name) for name in RULES}
    references = [
        {"optimizer": name, "lr": lr[name], "rule": None, "size": REFERENCE_SIZE, "seed": seed}
        for name in RULES
        for seed in (*SEEDS, *AGAIN)
    ]
    return references + [
        {"optimizer": name, "lr": lr[name], "rule": rule, "size": size, "seed": seed}
        for name, rules in RULES.items()
        for size in SIZES
        for rule in rules
        for seed in SEEDS
    ]


def run_job(optimizer: str, lr: float, rule: str | None, size: int, seed: int) -> dict[str, Any]:
    """Convert the reference to a batch size and train it."""
    recipe = build_reference(optimizer, lr)
    if rule is not None:
        recipe = convert_recipe(recipe, rule, size)
    args = recipe.optimizer.args
    stated = {key: args[key] for key in ("momentum", "weight_decay", "betas") if key in args}
    return {
        "carried": {"lr": round_figures(recipe.optimizer.lr), **stated},
        **train_curve(recipe, seed),
    }


def convert_recipe(recipe: Recipe, rule: str, size: int) -> Recipe:
    """Return the recipe at another size, by one of `RULES`."""
    shipped, with_decay = RULES[recipe.optimizer.name][rule]
    recipe_at_size = rescale(recipe, batch_size=size, rule=shipped).recipe
    if with_decay:
        return recipe_at_size
    args = recipe_at_size.optimizer.args | {"weight_decay": recipe.optimizer.args["weight_decay"]}
    optimizer = recipe_at_size.optimizer.model_copy(update={"args": args})
    return recipe_at_size.model_copy(update={"optimizer": optimizer})
