"""What the numbers of an optimiser mean: how each goes with the size of the gradient.

    g' = B g  makes the same path,  if each number x becomes  x' = B^p x

as Sum is B times Mean. p = -1 for the rate of SGD, which multiplies g, and 0 where g is divided by
its own size; 1 for what is added to g or compared with it: a coupled decay, an epsilon; 2 for what
is added to its square.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anybatch.recipe.names import is_code
from anybatch.recipe.optimizers import OPTIMIZERS
from anybatch.recipe.scaling.changes import Path, numeric
from anybatch.recipe.schema import OptimizerSection

__all__ = ["KINDS", "Kind", "kind_of", "numbers_of"]


@dataclass(frozen=True, slots=True)
class Kind:
    """An optimiser whose numbers are understood."""

    rule: str  # that `auto` takes
    powers: Mapping[str, int]  # p of each number that is not 0
    retained: tuple[str, ...] = ()  # moving averages, by what they keep of themselves an update
    is_decoupled: bool = False  # the decay is none of the gradient


_SGD = {"lr": -1, "weight_decay": 1}
_DIVIDED = {"eps": 1, "weight_decay": 1}
KINDS: Mapping[str, Kind] = {
    "sgd": Kind("linear", _SGD),
    "caffe_sgd": Kind("linear", _SGD),
    "adagrad": Kind("adagrad", _DIVIDED | {"initial_accumulator_value": 2}),
    "rmsprop": Kind("sqrt", _DIVIDED, ("alpha",)),
    "adam": Kind("sqrt", _DIVIDED, ("betas",)),
    "adamw": Kind("sqrt", {"eps": 1}, ("betas",), is_decoupled=True),
}


def kind_of(section: OptimizerSection) -> Kind | None:
    """What is known of a recipe's optimiser; None: nothing."""
    if section.name == "adam" and section.args.get("decoupled_weight_decay"):
        return KINDS["adamw"]
    return KINDS.get(section.name)


def numbers_of(section: OptimizerSection, name: str) -> Iterator[tuple[Path, Any]]:
    """Where an argument of the optimiser is stated, and its value: its own, the default where the
    recipe does not state it, and that of each group that has one of its own.

    Raises:
        RecipeError: what is no number, or no list of numbers.
    """
    own = section.args.get(name, _default(section.name, name))
    if own is not None:
        path: Path = ("optimizer", "args", name)
        yield path, numeric(path, own)
    for number, group in enumerate(section.groups):
        if name in (group.model_extra or {}):
            path = ("optimizer", "groups", number, name)
            yield path, numeric(path, (group.model_extra or {})[name])


def _default(optimizer: str, name: str) -> Any:
    if is_code(optimizer):
        return None
    parameter = inspect.signature(OPTIMIZERS[optimizer]).parameters.get(name)
    return None if parameter is None else parameter.default
