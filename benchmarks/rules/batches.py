"""Rules of the learning rate and of AdamW's decay, from a batch of 32 to the full set.

Each rule is that of `anybatch.recipe.scaling.rescale`; a control leaves the decay as it was.
A second group of five seeds at the reference size tells how far two groups of runs are apart that
differ by nothing.
"""

from collections.abc import Mapping
from typing import Any

from anybatch.recipe.scaling import Rule, rescale
from anybatch.recipe.schema import Recipe
from rules.common import FULL, REFERENCE_SIZE, SEEDS, curve, reference, rounded
from rules.data import fitting
from rules.rates import tuned

__all__ = ["AGAIN", "ASKED", "RULES", "SIZES", "carried", "jobs", "run"]

ASKED = (256, 1024, 4096)
SIZES = (*fitting(ASKED), FULL)
AGAIN = tuple(seed + len(SEEDS) for seed in SEEDS)  # the second group
RULES: dict[str, dict[str, tuple[Rule, bool]]] = {  # rule of `carry`, and whether decay is carried
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


def jobs(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reference over ten seeds, and each rule at each size over five."""
    lr = {name: tuned(raw, name) for name in RULES}
    found = [
        {"optimizer": name, "lr": lr[name], "rule": None, "size": REFERENCE_SIZE, "seed": seed}
        for name in RULES
        for seed in (*SEEDS, *AGAIN)
    ]
    return found + [
        {"optimizer": name, "lr": lr[name], "rule": rule, "size": size, "seed": seed}
        for name, rules in RULES.items()
        for size in SIZES
        for rule in rules
        for seed in SEEDS
    ]


def run(optimizer: str, lr: float, rule: str | None, size: int, seed: int) -> dict[str, Any]:
    """Carry the reference and train it."""
    recipe = reference(optimizer, lr)
    if rule is not None:
        recipe = carried(recipe, rule, size)
    args = recipe.optimizer.args
    stated = {key: args[key] for key in ("momentum", "weight_decay", "betas") if key in args}
    return {"carried": {"lr": rounded(recipe.optimizer.lr), **stated}, **curve(recipe, seed)}


def carried(recipe: Recipe, rule: str, size: int) -> Recipe:
    """The recipe at another size by one of `RULES`."""
    shipped, with_decay = RULES[recipe.optimizer.name][rule]
    found = rescale(recipe, batch_size=size, rule=shipped).recipe
    if with_decay:
        return found
    args = found.optimizer.args | {"weight_decay": recipe.optimizer.args["weight_decay"]}
    optimizer = found.optimizer.model_copy(update={"args": args})
    return found.model_copy(update={"optimizer": optimizer})
