"""The optimiser that a recipe's [optimizer] states, with its parameter groups."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from anybatch.errors import RecipeError
from anybatch.recipe.names import call_function, find_function
from anybatch.recipe.schema import OptimizerSection
from anybatch.zoo.caffe import CaffeSGD

__all__ = ["OPTIMIZERS", "build_optimizer"]

Make = Callable[..., Optimizer]

_NEED_MORE = (Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)  # a closure; sparse gradients

OPTIMIZERS: Mapping[str, Make] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in _NEED_MORE
} | {"caffe_sgd": CaffeSGD}
"""Those of torch.optim that take one gradient a batch, by their names in lower case."""


def build_optimizer(section: OptimizerSection, model: nn.Module, *, allow_code: bool) -> Optimizer:
    """The optimiser over a model's parameters.

    Raises:
        RecipeError: a name, argument or pattern that is not expected, or code of the user's that
            makes no optimiser.
    """
    for name, place in (("lr", "optimizer.lr"), ("params", "[model]: they are all the model's")):
        if name in section.args:
            raise RecipeError(f"optimizer.args.{name}: expected in {place}; take it out of args.")
    make: Make = find_function(section.name, OPTIMIZERS, "optimizer", allow_code=allow_code)
    # Made without groups first, so that a wrong argument is found as the recipe's.
    optimizer: object = call_function(
        make, section.args, "optimizer.args", params=model.parameters(), lr=section.lr
    )
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(
            f"optimizer {section.name!r} made a {type(optimizer).__name__}, expected a "
            f"torch.optim.Optimizer over the parameters that it was given."
        )
    if section.groups:
        return make(_build_groups(section, model, make), lr=section.lr, **section.args)
    return optimizer


def _build_groups(section: OptimizerSection, model: nn.Module, make: Make) -> list[dict[str, Any]]:
    """The parameters that no group holds, at the optimiser's own rate, and then each group."""
    left = _list_names(model)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(section.groups):
        where = f"optimizer.groups.{number}"
        held = _select_parameters(group.on, left, model, where)
        args = dict(group.model_extra or {})
        for name, instead in (("lr", "lr_factor"), ("params", "on")):
            if name in args:
                raise RecipeError(f"{where}.{name}: expected {instead} instead.")
        lr = section.lr * group.lr_factor
        # Made only to be refused: torch checks no argument of a group.
        call_function(make, section.args | args, where, params=held, lr=lr)
        groups.append({"params": held, "lr": lr, **args})
        left = {p: names for p, names in left.items() if not any(p is own for own in held)}
    return [{"params": list(left)}, *groups]


def _list_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def _select_parameters(
    patterns: list[str], left: dict[nn.Parameter, list[str]], model: nn.Module, where: str
) -> list[nn.Parameter]:
    """The parameters left of which a name matches; each pattern must match one of the model's."""
    every = [name for names in _list_names(model).values() for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise RecipeError(
                f"{where}.on: {pattern!r} matches no parameter. There are: {', '.join(every)}."
            )
    held = [
        p
        for p, names in left.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    ]
    if not held:
        raise RecipeError(
            f"{where}.on = {patterns} leaves this group empty: the first group that matches a "
            f"parameter holds it. Put the narrower patterns first, or take the group out."
        )
    return held
