"""All that a checkpoint holds: what changes arithmetic, and nothing that knows of ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.compiled import unwrap
from anybatch.distributed import shards
from anybatch.errors import AnybatchError, RunError
from anybatch.gradient.survey import separate_elements
from anybatch.training.body import Body
from anybatch.training.packing import pack, unpack
from anybatch.training.precision import LossScale
from anybatch.training.sharded import ShardedOptimizer
from anybatch.training.surroundings import generators, restore_generators
from anybatch.training.user_state import Stateful, check_kind, read_state, restore_state

__all__ = ["Stateful", "TrainingState"]

State = dict[str, Any]

# A state that was changed, or is of another model, may raise any of these.
_MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)


@dataclass
class TrainingState:
    """Weights and buffers, optimiser, reduction state, loss scale, the user's own, and what the
    loop's body changes besides: frozen parameters, modes, the global random generators.

    Raises:
        RunError: a user object that cannot be saved.
    """

    model: nn.Module
    optimizer: Optimizer | ShardedOptimizer
    user: Mapping[str, Any] = field(default_factory=dict)
    reduction: Mapping[str, Tensor | None] = field(default_factory=dict)
    num_updates: int = 0  # made so far, skipped ones included
    loss_scale: LossScale = field(default_factory=lambda: LossScale("float32"))

    body: Body = field(init=False)

    def __post_init__(self) -> None:
        for name, thing in self.user.items():
            check_kind(name, thing)
        self.body = Body(self.model)

    def check(self) -> None:
        """See before the first update that all can be saved.

        Raises:
            RunError: a value that no checkpoint can hold; it names the place.
        """
        self._pack_user()
        pack(dict(unwrap(self.model).state_dict()), "model.state_dict()")
        pack(self.optimizer.state_dict(), "optimizer.state_dict()")

    def dump(self) -> State:
        """The state as nested dicts of tensors and plain values; tensors are not copied.

        Raises:
            RunError: a value that no checkpoint can hold; it names the place.
        """
        return {
            "model": pack(dict(unwrap(self.model).state_dict()), "model.state_dict()"),
            "optimizer": pack(self.optimizer.state_dict(), "optimizer.state_dict()"),
            "reduction": dict(self.reduction),
            "loss_scale": self.loss_scale.state_dict(),
            "user": self._pack_user(),
            "body": pack(self.body.dump(self.optimizer), "the model's attributes"),
            "generators": self.generators(),
        }

    def generators(self) -> State:
        """Read the states of the global generators."""
        return generators(_device_of(self.model))

    def _pack_user(self) -> State:
        return {
            name: pack(read_state(thing), f"state[{name!r}]") for name, thing in self.user.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `dump` has given.

        Raises:
            RunError: a state of another model, or of other user objects.
        """
        for module in unwrap(self.model).modules():
            separate_elements(module)
        with _refusals():
            user = self._restore_own({name: unpack(part) for name, part in state.items()})
        for name, thing in self.user.items():
            is_ours = type(thing).__module__.partition(".")[0] == "anybatch"
            with _refusals() if is_ours else nullcontext():
                _restore_one(thing, user[name], f"state[{name!r}]")

    def _restore_own(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take up all but the states of the user's objects, which it returns."""
        if set(state["user"]) != set(self.user):
            raise RunError(
                f"the checkpoint holds the user's {sorted(state['user'])}, "
                f"expected {sorted(self.user)}: pass the same state={{...}} as before."
            )
        assert isinstance(self.optimizer, Optimizer)  # parts are cut of what is restored
        model = unwrap(self.model)
        model.load_state_dict(shards.cut_alike(state["model"], model.state_dict()))
        if "body" in state:  # checkpoints of 0.1.0 have neither
            self.body.restore(state["body"], self.optimizer)
            restore_generators(state["generators"], _device_of(self.model))
        self.optimizer.load_state_dict(_cut(state["optimizer"], self.optimizer))
        self.reduction = dict(state["reduction"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        return dict(state["user"])


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever a state of another kind raises into one message."""
    try:
        yield
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:  # a checkpoint may hold anything, and so may what it raises
        told = error if isinstance(error, RuntimeError | ValueError) else repr(error)
        raise RunError(
            f"the checkpoint does not fit this model and optimiser: {told} "
            f"Build them as they were when the run began."
        ) from error


def _restore_one(thing: Any, state: Any, place: str) -> None:
    """Take up the state of an object of the user's."""
    if restore_state(thing, state, place) is not thing:
        raise RunError(
            f"{place} has the shape {tuple(thing.shape)} and the type {thing.dtype}, and "
            f"the checkpoint holds another. Make it as it was when the run began."
        )


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
