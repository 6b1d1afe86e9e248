"""All that a checkpoint holds: what changes arithmetic, and nothing that knows of ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.compiled import unwrap
from anybatch.distributed import shards
from anybatch.errors import AnybatchError, RunError
from anybatch.training.precision import LossScale
from anybatch.training.sharded import ShardedOptimizer
from anybatch.training.surroundings import (
    body_of,
    generators,
    restore_body,
    restore_generators,
)

__all__ = ["Stateful", "TrainingState"]

State = dict[str, Any]


@runtime_checkable
class Stateful(Protocol):
    """Anything of the user's that a run must carry on with."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class TrainingState:
    """Weights and buffers, optimiser, reduction state, loss scale, the user's own, and what the
    loop's body changes besides: frozen parameters, modes, the global random generators.

    Raises:
        RunError: a user object that cannot be saved.
    """

    model: nn.Module
    optimizer: Optimizer | ShardedOptimizer
    user: Mapping[str, Stateful] = field(default_factory=dict)
    reduction: Mapping[str, Tensor | None] = field(default_factory=dict)
    num_updates: int = 0  # made so far, skipped ones included
    loss_scale: LossScale = field(default_factory=lambda: LossScale("float32"))

    def __post_init__(self) -> None:
        for name, thing in self.user.items():
            if not isinstance(thing, Stateful):
                raise RunError(
                    f"state[{name!r}] is a {type(thing).__name__}, expected an object with "
                    f"state_dict() and load_state_dict(): it would be lost on resume."
                )

    def dump(self) -> State:
        """The state as nested dicts of tensors and plain values; tensors are not copied."""
        return {
            "model": dict(unwrap(self.model).state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "reduction": dict(self.reduction),
            "loss_scale": self.loss_scale.state_dict(),
            "user": {name: thing.state_dict() for name, thing in self.user.items()},
            "body": body_of(self.model),
            "generators": generators(_device_of(self.model)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `dump` has given.

        Raises:
            RunError: a state of another model, or of other user objects.
        """
        with _refusals():
            self._restore_own(state)
        for name, thing in self.user.items():
            is_ours = type(thing).__module__.partition(".")[0] == "anybatch"
            with _refusals() if is_ours else nullcontext():
                thing.load_state_dict(shards.cut_alike(state["user"][name], thing.state_dict()))

    def _restore_own(self, state: Mapping[str, Any]) -> None:
        """Take up all but the states of the user's objects."""
        if set(state["user"]) != set(self.user):
            raise RunError(
                f"the checkpoint holds the user's {sorted(state['user'])}, "
                f"expected {sorted(self.user)}: pass the same state={{...}} as before."
            )
        model = unwrap(self.model)
        model.load_state_dict(shards.cut_alike(state["model"], model.state_dict()))
        assert isinstance(self.optimizer, Optimizer)  # parts are cut of what is restored
        self.optimizer.load_state_dict(_cut(state["optimizer"], self.optimizer))
        self.reduction = dict(state["reduction"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        if "body" in state:  # checkpoints of 0.1.0 have neither
            restore_body(self.model, state["body"])
            restore_generators(state["generators"], _device_of(self.model))


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever a state of another kind raises into one message."""
    try:
        yield
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:  # a checkpoint may hold anything, and so may what it raises
        raise RunError(
            f"the checkpoint does not fit this model and optimiser: {error} "
            f"Build them as they were when the run began."
        ) from error


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _cut(state: State, optimizer: Optimizer) -> State:
    """An optimiser's state as its parameters are in slices, if they are."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        place: {
            key: shards.cut_like(value, held[place])
            if isinstance(value, Tensor) and value.shape == held[place].shape
            else value
            for key, value in one.items()
        }
        for place, one in state["state"].items()
    }
    return state | {"state": own}
