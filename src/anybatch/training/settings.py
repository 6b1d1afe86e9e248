"""What a run may not change on resume, as plain JSON: all that changes arithmetic.

The number of epochs, checkpoints and trackers are not among them.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from anybatch.gradient import ClipNorm
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.schedules import Schedule

__all__ = ["settings_of"]


def settings_of(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    order: OrderProtocol,
    clip: ClipNorm | None,
    schedule: Schedule | None,
) -> dict[str, Any]:
    """The settings of a run by name."""
    return {
        "model": {
            name: [str(p.dtype), *p.shape, "trained" if p.requires_grad else "frozen"]
            for name, p in model.named_parameters()
        },
        "example_losses": describe(objective.example_losses),
        "reduction": {name: describe(r) for name, r in objective.reductions.items()},
        "penalty": [describe(term) for term in objective.penalty or ()],
        "grain": objective.grain,
        "optimizer": [type(optimizer).__qualname__, *map(_group, optimizer.param_groups)],
        "order": describe(order),
        "clip": describe(clip),
        "schedule": describe(schedule),
    }


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's settings, with the rate that it began with."""
    begun = {**group, "lr": group.get("initial_lr", group["lr"])}
    return {k: describe(v) for k, v in begun.items() if k not in ("params", "initial_lr")}


def describe(thing: Any) -> Any:
    """A value as JSON keeps it, without addresses in memory."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {str(name): describe(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    text = repr(thing)
    if " at 0x" not in text:
        return text
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
