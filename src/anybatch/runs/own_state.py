"""State and records of a run whose loop is the user's: GANs, reinforcement learning, closures.

    updates = run.resume(state=state)         restore the newest checkpoint; 0: there is none
    run.record(gradient, step=t)              a row of the records, and of the ledger
    run.checkpoint(state=state)               the state after the last update that was recorded

The state is a dict of the objects that training changes: models, optimisers, generators of random
numbers. The states of the global generators are saved with it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.batch import is_count
from anybatch.errors import RunError
from anybatch.gradient import Gradient
from anybatch.runs.body import Body
from anybatch.runs.packing import unpack
from anybatch.runs.state import read_generators, restore_generators, restore_user_object
from anybatch.runs.user_state import check_kind, pack_objects

__all__ = ["OwnState", "check_step", "make_row"]


class _NoGroups:
    """Optimiser without groups, for `Body`: the user's optimisers are part of the state."""

    param_groups: tuple[()] = ()


class OwnState:
    """Objects that a loop of the user's changes, by name.

    Raises:
        RunError: there are none, or one cannot be saved.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        if not isinstance(objects, Mapping) or not objects:
            raise RunError(
                f"state is {objects!r}. It must be a dict of what the loop changes, such as "
                f'{{"model": model, "optimizer": optimizer}}.'
            )
        for name, thing in objects.items():
            check_kind(name, thing)
        self.objects = dict(objects)
        self._modules = {n: thing for n, thing in objects.items() if isinstance(thing, nn.Module)}
        self._bodies = {name: Body(module) for name, module in self._modules.items()}
        self.num_updates = 0
        self.num_examples = 0  # in these updates

    def list_parameters(self) -> dict[str, Tensor]:
        """List the parameters of the models, by name."""
        return {
            f"{name}.{inner}": p
            for name, module in self._modules.items()
            for inner, p in module.named_parameters()
        }

    def dump(self) -> dict[str, Any]:
        """Return the state as nested dicts of tensors and plain values.

        Raises:
            RunError: no checkpoint can hold a value; the message names its place.
        """
        bodies = {name: body.dump(_NoGroups) for name, body in self._bodies.items()}
        return {
            "user": pack_objects(self.objects),
            "bodies": bodies,
            "generators": read_generators(self._find_device()),
            "progress": {"examples": self.num_examples},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `dump` has returned.

        Raises:
            RunError: the checkpoint is of another loop or of other objects.
        """
        if "bodies" not in state or set(state["user"]) != set(self.objects):
            other = sorted(state["user"]) if "bodies" in state else "of ab.steps"
            raise RunError(
                f"the checkpoint holds the state {other}, and the state here is "
                f"{sorted(self.objects)}. Pass the same state={{...}} as before, to the same kind "
                f"of loop."
            )
        plain = {name: unpack(value) for name, value in state.items()}
        for name, body in self._bodies.items():
            body.restore(plain["bodies"][name], _NoGroups)
        for name, thing in self.objects.items():
            restore_user_object(thing, plain["user"][name], f"state[{name!r}]")
        restore_generators(plain["generators"], self._find_device())
        self.num_examples = int(plain["progress"]["examples"])

    def _find_device(self) -> torch.device:
        return next((p.device for p in self.list_parameters().values()), torch.device("cpu"))


def make_row(
    gradient: Gradient, step: int, epoch: int, examples: int, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """Make the row of an update for the records.

    Args:
        examples: used so far, this update's included.
        metrics: further figures of the loop.
    """
    row: dict[str, Any] = {
        "kind": "step",
        "step": step,
        "epoch": epoch,
        "examples": examples,
        "loss": gradient.loss.item(),
        "parts": {name: part.item() for name, part in gradient.parts.items()},
        "metrics": {name: metric.item() for name, metric in gradient.metrics.items()}
        | {name: float(value) for name, value in metrics.items()},
    }
    return row if gradient.is_finite else row | {"skipped": True}


def check_step(step: object, least: int) -> int:
    """Return the number of an update; refuse one that does not follow the earlier ones.

    Raises:
        RunError: it is no number, or lies before what is recorded already.
    """
    if not (is_count(step) or (type(step) is int and step == 0)):
        raise RunError(f"step is {step!r}. It must be the number of the update, from 0.")
    number: Any = step
    if number < least:
        raise RunError(
            f"step is {number}, and updates up to {least - 1} are recorded already. Begin the loop "
            f"at the number that run.resume(state=...) returns."
        )
    return int(number)
