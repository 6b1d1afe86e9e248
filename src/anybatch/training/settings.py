"""What a run may not change on resume, as plain JSON: all that changes arithmetic.

The number of epochs, the layout, checkpoints and trackers are not among them.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import RunError
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.training.digest import digest

__all__ = ["check_alike", "compare", "describe", "settings_of"]


def settings_of(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    order: OrderProtocol,
    **others: Any,
) -> dict[str, Any]:
    """The settings of a run by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "model": {
            name: [str(p.dtype), *p.shape, "trained" if p.requires_grad else "frozen"]
            for name, p in model.named_parameters()
        },
        "example_losses": describe(objective.example_losses),
        "reduction": {name: describe(r) for name, r in objective.reductions.items()},
        "penalty": [describe(term) for term in objective.penalty or ()],
        "grain": objective.grain,
        "optimizer": {
            "class": type(optimizer).__qualname__,
            "groups": [_group(group, names) for group in optimizer.param_groups],
        },
        "order": describe(order),
        "order_begins": digest(order.indices(0)),  # an order of the user's may not print itself
        **{name: describe(other) for name, other in others.items()},
    }


def compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a run goes on with the settings that it was begun with.

    Raises:
        RunError: naming the first that differs.
    """
    for name in sorted({*before, *now}):
        found = _difference(name, before.get(name), now.get(name))
        if found is not None:
            place, old, new = found
            raise RunError(
                f"{folder} was begun with {place} = {old!r}, and cannot go on with {new!r}: the "
                f"run would be neither. Restore the setting, or begin a new run in another folder."
            )


def check_alike(model: nn.Module, settings: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """See that all ranks begin with the same settings and the same weights.

    Raises:
        RunError: naming the first that differs from the first rank's, and the rank.
    """
    if group is None:
        return
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    told = distributed.everywhere(
        lambda: {"settings": settings} | {"weights": {n: digest(t) for n, t in tensors.items()}},
        group,
    )
    for rank, other in enumerate(told):
        found = _difference("", told[0], other)
        if found is not None:
            place, first, own = found
            raise RunError(
                f"rank {rank} begins with {place[1:]} = {own!r} and rank 0 with {first!r}, "
                f"expected the same on all: they would train different models. Pass the same "
                f"arguments everywhere, and call torch.manual_seed before the model is made."
            )


def describe(thing: Any) -> Any:
    """A value as JSON keeps it; other things as they print, without addresses in memory."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return repr(thing)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {str(name): describe(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    if isinstance(thing, Tensor | np.ndarray):  # too long to print in full, or to full precision
        return describe(thing.tolist()) if thing.ndim == 0 else digest(thing)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """A parameter group's settings, with the rate that it began with."""
    begun = {**group, "params": [names[id(p)] for p in group["params"]]}
    if "initial_lr" in begun:
        begun["lr"] = begun.pop("initial_lr")
    return {name: describe(value) for name, value in begun.items()}


def _difference(place: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        inside = [(f"{place}.{key}", old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inside = [(f"{place}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (place, old, new)
    return next((found for pair in inside if (found := _difference(*pair))), None)
