"""Objects of the user's that a run keeps: read for a checkpoint, and restored in place.

| object | what a checkpoint holds |
|---|---|
| with `state_dict()` and `load_state_dict()` | what `state_dict()` returns |
| a generator of torch, NumPy or `random` | its state |
| a dict, list, set, deque, tensor or array | its content, read in the same way |

A number or string cannot be restored in place: the user's variable would keep its value.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from anybatch.distributed import fsdp
from anybatch.errors import RunError

__all__ = ["Stateful", "check_kind", "read_state", "restore_state"]


@runtime_checkable
class Stateful(Protocol):
    """An object that says what its state is, and takes it up again."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class _Kind(NamedTuple):
    """How the state of a kind of object is read, and restored in place."""

    types: tuple[type, ...]
    read: Callable[[Any], Any]
    restore: Callable[[Any, Any, str], object]


def check_kind(name: str, thing: Any) -> None:
    """Refuse an object whose state cannot be restored in place.

    Raises:
        RunError: it names the object.
    """
    if _kind_of(thing) is not None and not isinstance(thing, random.SystemRandom):
        return
    what = f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"
    raise RunError(
        f"state[{name!r}] is {what}, which cannot be restored in place: the loop's own variable "
        f"would keep the value that it has at the start. Pass an object with state_dict() and "
        f"load_state_dict(), a generator of random numbers, a tensor, or a dict or list that the "
        f"loop changes, such as own = {{{name!r}: ...}} and state={{'own': own}}."
    )


def read_state(thing: Any) -> Any:
    """Read the state of an object, and of all that a container holds."""
    kind = _kind_of(thing)
    return thing if kind is None else kind.read(thing)


def restore_state(thing: Any, state: Any, place: str) -> Any:
    """Give an object, and all that a container holds, the state that was read.

    Args:
        place: the expression that errors call the object by.

    Returns:
        The object itself where it can change in place; the value from the state otherwise.

    Raises:
        RunError: a state of another kind.
    """
    kind = _kind_of(thing)
    if kind is None or (isinstance(thing, Tensor | np.ndarray) and not _fits(thing, state)):
        return state
    if isinstance(thing, Stateful):  # what it raises is the user's own
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


def _kind_of(thing: Any) -> _Kind | None:
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


def _restore_dict(own: Any, state: Any, place: str) -> None:
    new = {k: restore_state(own.get(k), v, f"{place}[{k!r}]") for k, v in state.items()}
    own.clear()
    for key, value in new.items():  # update() of a Counter adds
        own[key] = value


def _restore_list(own: Any, state: Any, place: str) -> None:
    olds = [*own, *[None] * len(state)]
    pairs = zip(olds, state, strict=False)
    new = [restore_state(old, v, f"{place}[{i}]") for i, (old, v) in enumerate(pairs)]
    own.clear()
    own.extend(new)


def _restore_set(own: Any, state: Any, _: str) -> None:
    new = set(state)
    own.clear()
    own.update(new)


def _fits(own: Any, state: Any) -> bool:
    is_same_kind = isinstance(state, Tensor) == isinstance(own, Tensor)
    return (
        is_same_kind
        and hasattr(state, "shape")
        and state.shape == own.shape
        and (state.dtype == own.dtype)
    )


@torch.no_grad()
def _restore_tensor(own: Tensor, state: Any, _: str) -> None:
    own.copy_(fsdp.shard_like(state, own))


def _restore_array(own: Any, state: Any, _: str) -> None:
    own[...] = state


def _load(own: Any, state: Any, _: str) -> None:
    own.load_state_dict(fsdp.shard_state_like(state, own.state_dict()))


_KINDS = (
    _Kind((Stateful,), lambda own: own.state_dict(), _load),
    _Kind(
        (torch.Generator,),
        lambda own: own.get_state(),
        lambda own, state, _: own.set_state(state.cpu()),
    ),
    _Kind(
        (np.random.Generator, np.random.RandomState, np.random.BitGenerator),
        _read_numpy,
        _restore_numpy,
    ),
    _Kind(
        (random.Random,),
        lambda own: own.getstate(),
        lambda own, state, _: own.setstate(state),
    ),
    _Kind((dict,), lambda own: {k: read_state(v) for k, v in own.items()}, _restore_dict),
    _Kind((list, deque), lambda own: [read_state(v) for v in own], _restore_list),
    _Kind((set,), set, _restore_set),
    _Kind((Tensor,), lambda own: own.detach(), _restore_tensor),
    _Kind((np.ndarray,), lambda own: own, _restore_array),
)
