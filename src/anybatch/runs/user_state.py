"""Read the state of the user's objects for a checkpoint, and restore it in place.

| object | what a checkpoint holds |
|---|---|
| with `state_dict()` and `load_state_dict()` | what `state_dict()` returns |
| a generator of torch, NumPy or `random` | its state |
| a dict, list, set, deque, tensor or array | its content, read in the same way |

A number or string cannot be restored in place: the user's variable would keep its value.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from anybatch.distributed import fsdp
from anybatch.errors import RunError
from anybatch.runs.packing import pack

__all__ = ["Stateful", "check_kind", "pack_objects", "restore_state"]


@runtime_checkable
class Stateful(Protocol):
    """An object that can save and load its state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class _Kind(NamedTuple):
    """Functions that read the state of some types, and restore it in place."""

    types: tuple[type, ...]
    read: Callable[[Any], Any]
    restore: Callable[[Any, Any, str], object]


def check_kind(name: str, thing: Any) -> None:
    """Raise if the state of an object cannot be restored in place."""
    if _find_kind(thing) is not None and not isinstance(thing, random.SystemRandom):
        return
    what = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
    raise RunError(
        f"state[{name!r}] is {what}, which cannot be restored in place: the loop's own variable "
        f"would keep the value that it has at the start. Pass an object with state_dict() and "
        f"load_state_dict(), a generator of random numbers, a tensor, or a dict or list that the "
        f"loop changes, such as own = {{{name!r}: ...}} and state={{'own': own}}."
    )


def pack_objects(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Read the states of the user's objects in the form that a checkpoint holds."""
    return {name: pack(_read_state(x), f"state[{name!r}]") for name, x in objects.items()}


def _read_state(thing: Any) -> Any:
    """Read the state of an object, and of all that a container holds."""
    kind = _find_kind(thing)
    return thing if kind is None else kind.read(thing)


def restore_state(thing: Any, state: Any, place: str) -> Any:
    """Restore the state of an object, and of all that a container holds.

    Args:
        place: the expression that names the object in errors.

    Returns:
        The object itself if it can change in place, otherwise the value from the state.

    Raises:
        RunError: the state is of another kind.
    """
    kind = _find_kind(thing)
    if kind is None or (isinstance(thing, Tensor | np.ndarray) and not _fits(thing, state)):
        return state
    if isinstance(thing, Stateful):  # its errors are the user's own
        kind.restore(thing, state, place)
        return thing
    try:
        kind.restore(thing, state, place)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise RunError(
            f"{place} is a {type(thing).__name__}, and the checkpoint holds the state of something "
            f"else: {error}. Pass the same state={{...}} as when the run began."
        ) from error
    return thing


def _find_kind(thing: Any) -> _Kind | None:
    if isinstance(thing, type):
        return None
    return next((kind for kind in _KINDS if isinstance(thing, kind.types)), None)


def _read_numpy(generator: Any) -> Any:
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return getattr(generator, "bit_generator", generator).state


def _restore_numpy(generator: Any, state: Any, _: str) -> None:
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _restore_dict(target: Any, state: Any, place: str) -> None:
    new = {k: restore_state(target.get(k), v, f"{place}[{k!r}]") for k, v in state.items()}
    target.clear()
    for key, value in new.items():  # update() of a Counter would add
        target[key] = value


def _restore_list(target: Any, state: Any, place: str) -> None:
    olds = [*target, *[None] * len(state)]
    pairs = zip(olds, state, strict=False)
    new = [restore_state(old, v, f"{place}[{i}]") for i, (old, v) in enumerate(pairs)]
    target.clear()
    target.extend(new)


def _restore_set(target: Any, state: Any, _: str) -> None:
    new = set(state)
    target.clear()
    target.update(new)


def _fits(target: Any, state: Any) -> bool:
    return (
        isinstance(state, Tensor) == isinstance(target, Tensor)
        and hasattr(state, "shape")
        and state.shape == target.shape
        and (state.dtype == target.dtype)
    )


@torch.no_grad()
def _restore_tensor(target: Tensor, state: Any, _: str) -> None:
    target.copy_(fsdp.shard_like(state, target))


def _load(target: Any, state: Any, _: str) -> None:
    target.load_state_dict(fsdp.shard_state_like(state, target.state_dict()))


_KINDS = (
    _Kind((Stateful,), lambda thing: thing.state_dict(), _load),
    _Kind(
        (torch.Generator,),
        lambda thing: thing.get_state(),
        lambda thing, state, _: thing.set_state(state.cpu()),
    ),
    _Kind(
        (np.random.Generator, np.random.RandomState, np.random.BitGenerator),
        _read_numpy,
        _restore_numpy,
    ),
    _Kind(
        (random.Random,),
        lambda thing: thing.getstate(),
        lambda thing, state, _: thing.setstate(state),
    ),
    _Kind((dict,), lambda thing: {k: _read_state(v) for k, v in thing.items()}, _restore_dict),
    _Kind((list, deque), lambda thing: [_read_state(v) for v in thing], _restore_list),
    _Kind((set,), set, _restore_set),
    _Kind((Tensor,), lambda thing: thing.detach(), _restore_tensor),
    _Kind((np.ndarray,), lambda thing: thing, lambda thing, state, _: np.copyto(thing, state)),
)
