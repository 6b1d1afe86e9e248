"""Modules besides the model that a run trains: they must be in its checkpoints.

A critic or a teacher that `example_losses` uses is not part of the model. If the loop's body trains
it, a resumed run finds it as it was made, unless it is among the `state` of the run.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import nn

from anybatch.errors import RunError
from anybatch.gradient.closures import find_modules
from anybatch.objective import Objective
from anybatch.pytree import sum_versions

__all__ = ["OutsideModules"]


class OutsideModules:
    """Modules that the losses use, which neither the model nor the state of a run holds.

    Args:
        model, objective: as in training.
        state: the user's objects in checkpoints.
    """

    def __init__(self, model: nn.Module, objective: Objective, state: Mapping[str, Any]) -> None:
        held = {id(part) for thing in state.values() for part in _modules_of(thing)}
        found = find_modules(objective.example_losses, model)
        self._modules = {name: m for name, m in found.items() if id(m) not in held}
        self._versions = self._count()

    def check(self) -> None:
        """See that none has changed since the run was begun.

        Raises:
            RunError: one that a checkpoint would not hold.
        """
        for name, version in self._count().items():
            if version != self._versions[name]:
                raise RunError(
                    f"The module {name!r}, which example_losses uses, has changed during the run, "
                    f"and no checkpoint holds it: a resumed run would go on with another one. "
                    f"Pass steps(..., state={{{name!r}: ...}}) with it."
                )

    def _count(self) -> dict[str, int]:
        return {
            name: sum_versions([*module.parameters(), *module.buffers()])
            for name, module in self._modules.items()
        }


def _modules_of(thing: Any) -> list[nn.Module]:
    """List all modules that an object of the state holds."""
    things = [thing, *getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, dict | list | deque):  # of objects, each kept with its state
        things += list(thing.values() if isinstance(thing, dict) else thing)
    return [part for one in things if isinstance(one, nn.Module) for part in one.modules()]
