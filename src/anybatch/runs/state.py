"""State of a training: all that a checkpoint holds. It changes arithmetic, and depends on no rank.

The body of a loop may draw from the global generators of torch, NumPy and `random`. The library
itself draws from keys alone, and restores the generators after each update. So their states belong
to the body. They differ between machines, and are no part of a run's digest.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch.compiled import unwrap
from anybatch.distributed import fsdp
from anybatch.errors import AnybatchError, RunError
from anybatch.gradient import Gradient
from anybatch.gradient.survey import separate_elements
from anybatch.optim.closures import Closure, needs_closure
from anybatch.optim.loss_scale import LossScale
from anybatch.optim.zero import ShardedOptimizer
from anybatch.runs.body import Body
from anybatch.runs.packing import pack, unpack
from anybatch.runs.user_state import Stateful, check_kind, pack_objects, restore_state

__all__ = [
    "Stateful",
    "TrainingState",
    "find_device",
    "read_generators",
    "restore_generators",
    "restore_user_object",
]

State = dict[str, Any]


@dataclass
class TrainingState:
    """Weights and buffers, optimiser, reduction state, loss scale and the user's objects.

    It includes what the loop's body changes besides: frozen parameters, modes, attributes of
    modules, and the global random generators.

    Raises:
        RunError: a user object cannot be saved.
    """

    model: nn.Module
    optimizer: Optimizer | ShardedOptimizer
    user: Mapping[str, Any] = field(default_factory=dict)
    reduction: Mapping[str, Tensor | None] = field(default_factory=dict)
    num_updates: int = 0  # so far, skipped ones included
    loss_scale: LossScale = field(default_factory=lambda: LossScale("float32"))

    watch: Stateful | None = None  # the history of a watch; it changes no arithmetic
    body: Body = field(init=False)
    needs_closure: bool = field(init=False)  # of the optimiser's step

    def __post_init__(self) -> None:
        self.needs_closure = needs_closure(self.optimizer)
        for name, thing in self.user.items():
            check_kind(name, thing)
        self.body = Body(self.model)

    def update(
        self,
        gradient: Gradient,
        step: int,
        compute: Callable[[], Gradient] | None = None,
        *,
        has_stepped: bool = False,
    ) -> None:
        """Update the weights; skip a gradient that is not finite.

        Args:
            compute: computes the gradient of this step at other weights, for an optimiser that
                evaluates the loss itself.
            has_stepped: whether the optimiser has made its step already, in a compiled update.
        """
        self.loss_scale.note(gradient.is_finite, step=step)
        if gradient.is_finite:
            optimizer: Any = self.optimizer
            if not (self.needs_closure or has_stepped):
                try:
                    optimizer.step()
                except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                    if compute is None or "closure" not in str(error):
                        raise
                    self.needs_closure = True  # common implementations of SAM say so
            if self.needs_closure and compute is not None:
                optimizer.step(Closure(gradient, compute, optimizer))
            self.reduction = gradient.reduction_state
        self.num_updates = step + 1

    def check(self) -> None:
        """Check before the first update that everything can be saved.

        Raises:
            RunError: no checkpoint can hold a value; the message names its place.
        """
        pack_objects(self.user)
        pack(dict(unwrap(self.model).state_dict()), "model.state_dict()")
        pack(self.optimizer.state_dict(), "optimizer.state_dict()")

    def dump(self) -> State:
        """Return the state as nested dicts of tensors and plain values; tensors are not copied.

        Raises:
            RunError: no checkpoint can hold a value; the message names its place.
        """
        return {
            "model": pack(dict(unwrap(self.model).state_dict()), "model.state_dict()"),
            "optimizer": pack(self.optimizer.state_dict(), "optimizer.state_dict()"),
            "reduction": dict(self.reduction),
            "loss_scale": self.loss_scale.state_dict(),
            "user": pack_objects(self.user),
            "body": pack(self.body.dump(self.optimizer), "the model's attributes"),
            "generators": read_generators(find_device(self.model)),
        } | ({} if self.watch is None else {"watch": pack(self.watch.state_dict(), "the watch")})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `dump` has returned.

        Raises:
            RunError: the state is of another model, or of other user objects.
        """
        for module in unwrap(self.model).modules():
            separate_elements(module)
        with _explain_errors():
            user = self._restore_all_but_user({n: unpack(value) for n, value in state.items()})
        for name, thing in self.user.items():
            is_ours = type(thing).__module__.partition(".")[0] == "anybatch"
            with _explain_errors() if is_ours else nullcontext():
                restore_user_object(thing, user[name], f"state[{name!r}]")

    def _restore_all_but_user(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Restore everything but the user's objects, and return their states."""
        if set(state["user"]) != set(self.user):
            raise RunError(
                f"the checkpoint holds the user's {sorted(state['user'])}, and the state "
                f"here is {sorted(self.user)}. Pass the same state={{...}} as before."
            )
        assert isinstance(self.optimizer, Optimizer)  # it is sharded only after the restore
        model = unwrap(self.model)
        model.load_state_dict(fsdp.shard_state_like(state["model"], model.state_dict()))
        if "body" in state:  # checkpoints of 0.1.0 have neither body nor generators
            self.body.restore(state["body"], self.optimizer)
            restore_generators(state["generators"], find_device(self.model))
        self.optimizer.load_state_dict(_cut_to_slices(state["optimizer"], self.optimizer))
        self.reduction = dict(state["reduction"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        if self.watch is not None and "watch" in state:
            self.watch.load_state_dict(state["watch"])
        return dict(state["user"])


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Turn every error from a state that does not fit into one message."""
    try:
        yield
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:  # a checkpoint may hold anything, so anything may be raised
        reason = error if isinstance(error, RuntimeError | ValueError) else repr(error)
        raise RunError(
            f"the checkpoint does not fit this model and optimiser: {reason} "
            f"Build them as they were when the run began."
        ) from error


def restore_user_object(thing: Any, state: Any, place: str) -> None:
    """Restore an object in place.

    Args:
        place: the expression that names it in errors.

    Raises:
        RunError: the state is of another object.
    """
    if restore_state(thing, state, place) is not thing:
        raise RunError(
            f"{place} has the shape {tuple(thing.shape)} and the type {thing.dtype}, and "
            f"the checkpoint holds another. Make it as it was when the run began."
        )


def read_generators(device: torch.device) -> State:
    """Read the states of the global generators, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    numpy_words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, numpy_words, *rest],
        "random": [version, torch.tensor(words, dtype=torch.int64), spare],
    }


def restore_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the global generators; one whose state is None stays as it is."""
    if state["torch"] is not None:
        torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"].cpu(), device)
    if state["numpy"] is not None:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if state["random"] is not None:
        version, words, spare = state["random"]
        if not (spare is None or type(spare) is float):  # Python would return it as a draw
            raise TypeError(f"the state of Python's generator holds a {type(spare).__name__}.")
        random.setstate((version, tuple(words.tolist()), spare))


def find_device(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _cut_to_slices(state: State, optimizer: Optimizer) -> State:
    """Cut the state of an optimiser into the slices of its parameters, if they have slices."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slices = {
        place: {
            key: fsdp.shard_like(value, parameters[place])
            if isinstance(value, Tensor) and value.shape == parameters[place].shape
            else value
            for key, value in values.items()
        }
        for place, values in state["state"].items()
    }
    return state | {"state": slices}
