"""Build the optimiser of a recipe, with its parameter groups."""

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

_OTHER_STEPS = (Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)  # closure; sparse gradients

OPTIMIZERS: Mapping[str, Make] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in _OTHER_STEPS
} | {"caffe_sgd": CaffeSGD}
"""Optimisers of torch.optim that take one gradient for each batch, by name in lower case."""


_FUSED = ("sgd", "adam", "adamw")  # have one kernel for all parameters, on every device
_WAYS = {"fused", "foreach", "differentiable", "capturable"}  # that a recipe may choose itself


def build_optimizer(
    section: OptimizerSection, model: nn.Module, *, allow_code: bool, fused: bool = False
) -> Optimizer:
    """Build the optimiser over a model's parameters.

    Args:
        fused: whether to use torch's fused kernel, if there is one and the recipe chooses no other
            way. It is faster, and differs in the last bits.

    Raises:
        RecipeError: a wrong name, argument or pattern, or user code that makes no optimiser.
    """
    if "lr" in section.args:
        raise RecipeError("optimizer.args.lr: the rate is stated in optimizer.lr. Set it there.")
    if "params" in section.args:
        raise RecipeError(
            "optimizer.args.params: the parameters are all of the model's. Take it out of args."
        )
    make: Make = find_function(section.name, OPTIMIZERS, "optimizer", allow_code=allow_code)
    # Without groups first, so that a message about a wrong argument names optimizer.args.
    optimizer: object = call_function(
        make, section.args, "optimizer.args", params=model.parameters(), lr=section.lr
    )
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(
            f"optimizer {section.name!r} made a {type(optimizer).__name__}. Expected a "
            f"torch.optim.Optimizer over the parameters that it is called with."
        )
    ways = {"fused": True} if fused and _has_fused(section, model) else {}
    if not (ways or section.groups):
        return optimizer
    groups = _build_groups(section, model, make) if section.groups else model.parameters()
    return make(groups, lr=section.lr, **section.args, **ways)


def _has_fused(section: OptimizerSection, model: nn.Module) -> bool:
    """Return whether an optimiser can be fused, and the recipe leaves the choice open."""
    arguments = [section.args, *(group.model_extra or {} for group in section.groups)]
    is_open = not any(_WAYS & keys.keys() for keys in arguments)
    return (
        section.name in _FUSED and is_open and all(map(torch.is_floating_point, model.parameters()))
    )


def _build_groups(section: OptimizerSection, model: nn.Module, make: Make) -> list[dict[str, Any]]:
    """Build the parameter groups: first the parameters that no group of the recipe matches."""
    rest = _list_names(model)
    groups: list[dict[str, Any]] = []
    for number, group in enumerate(section.groups):
        key = f"optimizer.groups.{number}"
        parameters = _select_parameters(group.on, rest, model, key)
        args = dict(group.model_extra or {})
        for name, instead in (("lr", "lr_factor"), ("params", "on")):
            if name in args:
                raise RecipeError(f"{key}.{name}: a group has no such key. Set {instead} instead.")
        lr = section.lr * group.lr_factor
        # This optimiser is thrown away: torch checks the arguments of no group but the first.
        call_function(make, section.args | args, key, params=parameters, lr=lr)
        groups.append({"params": parameters, "lr": lr, **args})
        rest = {p: names for p, names in rest.items() if not any(p is one for one in parameters)}
    return [{"params": list(rest)}, *groups]


def _list_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """List all names of each parameter. A tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def _select_parameters(
    patterns: list[str], rest: dict[nn.Parameter, list[str]], model: nn.Module, key: str
) -> list[nn.Parameter]:
    """Select the parameters of `rest` that match a pattern. Each pattern must match something."""
    every = [name for names in _list_names(model).values() for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise RecipeError(
                f"{key}.on: {pattern!r} matches no parameter. There are: {', '.join(every)}."
            )
    parameters = [
        p
        for p, names in rest.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    ]
    if not parameters:
        raise RecipeError(
            f"{key}.on = {patterns} leaves this group empty: the first group that matches a "
            f"parameter holds it. Put the narrower patterns first, or take the group out."
        )
    return parameters
