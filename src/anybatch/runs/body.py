"""Track state of a model that the body of a loop changes and that no `state_dict` holds.

    is_trained     requires_grad of each parameter
    is_training    the mode of each module
    attributes     plain values in modules, and in objects that these hold: the rate of a dropout,
                   an eps, a temperature, `model.config.scale`; only those that the body changes
    groups         parameters of each group of the optimiser, by name

Attributes that the forward pass changes, such as a counter or a cache, are not tracked: the
self-check refuses those that matter.

A critic or a teacher that `example_losses` uses is not part of the model. If the body trains it, it
must be in the `state` of the run, or a resumed run would lose its training: see `OutsideModules`.
"""

import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from operator import is_
from types import ModuleType
from typing import Any
from weakref import ReferenceType

import numpy as np
from torch import Tensor, nn

from anybatch.compiled import unwrap
from anybatch.errors import RunError
from anybatch.gradient.closures import find_modules
from anybatch.objective import Objective
from anybatch.pytree import sum_versions
from anybatch.runs.packing import pack

__all__ = ["Body", "OutsideModules"]

_INTERNAL = set(nn.Module().__dict__)  # registries of parameters, hooks and the like
_PLAIN = (type(None), bool, int, float, complex, str)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_SAVED_ELSEWHERE = (nn.Module, nn.Parameter, ReferenceType)  # by a `state_dict`, for instance
_DEPTH = 2  # levels of objects in objects
_MAX_ITEMS = 100  # longer containers hold data

_ABSENT: Any = object()

_log = logging.getLogger(__name__)
Values = dict[str, Any]


class Body:
    """Tracks what the loop's body changes in a model, for checkpoints.

    Args:
        model: as the user has built it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._kinds = _kinds_of(self._model)
        self._values = dict(_read(self._model))
        self._stamp: list[tuple[Any, ...]] | None = None  # None: the values must be read
        self._forward_paths: set[str] = set()  # attributes that a forward pass changes
        self._body_paths: set[str] = set()  # attributes that the body changes
        self._warned_paths: set[str] = set()

    def enter(self) -> None:
        """Read the values before the body runs; earlier changes come from forward passes."""
        self._forward_paths |= self._read_changes()

    def leave(self) -> None:
        """Record what the body has changed since `enter`."""
        self._body_paths |= self._read_changes() - self._forward_paths

    def _read_changes(self) -> set[str]:
        """Read the values, and return the paths of those that have changed since the last time.

        If all values are plain, it is enough to see that each is the same object as before.
        """
        stamp = _stamp(self._model)
        if self._stamp is not None and _is_same(self._stamp, stamp):
            return set()
        now = dict(_read(self._model))
        changes = _find_changes(self._values, now)
        self._values = now
        has_plain_values = not any(type(value) is _Mark for value in now.values())
        self._stamp = stamp if has_plain_values else None
        return changes

    def dump(self, optimizer: Any) -> dict[str, Any]:
        """Read the state, by name.

        Raises:
            RunError: the body has replaced a module or function.
        """
        self._check_modules()
        names = {id(p): name for name, p in self._model.named_parameters()}
        groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        if any(None in group for group in groups):
            raise RunError(
                "The optimiser holds a parameter that is not the model's: the loop's body has "
                "added or replaced one. No checkpoint holds it. Make all parameters before "
                "steps(...), and change their values in place: p.data.copy_(new)."
            )
        return {
            "is_trained": {name: p.requires_grad for name, p in self._model.named_parameters()},
            "is_training": {name: module.training for name, module in self._model.named_modules()},
            "attributes": self._read_attributes(),
            "groups": groups,
        }

    def restore(self, state: Mapping[str, Any], optimizer: Any) -> None:
        """Restore the model and the groups of the optimiser from what `dump` has read."""
        for name, value in (*state["is_trained"].items(), *state["is_training"].items()):
            if type(value) is not bool:
                raise TypeError(f"whether {name} is trained is a {type(value).__name__}.")
        for name, p in self._model.named_parameters():
            if p.requires_grad != state["is_trained"].get(name, p.requires_grad):
                p.requires_grad_(not p.requires_grad)
        for name, module in self._model.named_modules():
            module.training = state["is_training"].get(name, module.training)
        for path, value in state.get("attributes", {}).items():
            _write(self._model, path, value)
            self._body_paths.add(path)
        self._values, self._stamp = dict(_read(self._model)), None
        _regroup(optimizer, dict(self._model.named_parameters()), state.get("groups"))

    def _read_attributes(self) -> Values:
        attributes = {}
        for path in sorted((self._body_paths - self._forward_paths) & self._values.keys()):
            value = self._values[path]
            thing = value.thing if isinstance(value, _Mark) else value
            try:
                pack(thing)
            except RunError:
                self._warn(path, thing)
            else:
                attributes[path] = thing
        return attributes

    def _warn(self, path: str, thing: Any) -> None:
        advice = (
            "A resumed run would go on with the one that the model is built with. Choose between "
            "several by a number or string in the module, or keep an object with state_dict() and "
            "load_state_dict() in steps(..., state={...})."
        )
        what = f"The loop's body has set {path} of the model to another {type(thing).__name__}"
        if callable(thing):
            raise RunError(f"{what}, which a checkpoint cannot hold. {advice}")
        if path not in self._warned_paths:
            _log.warning("%s, which no checkpoint holds. %s", what, advice)
        self._warned_paths.add(path)

    def _check_modules(self) -> None:
        now = _kinds_of(self._model)
        for name in sorted({*now, *self._kinds}):
            old, new = self._kinds.get(name), now.get(name)
            if old != new:
                raise RunError(
                    f"The loop's body has changed the module {name!r} of the model from "
                    f"{old or 'none'} to {new or 'none'}, and no checkpoint holds modules: a "
                    f"resumed run would go on with the model as it is built. Build the model with "
                    f"all its modules before steps(...), and choose between them by a number or "
                    f"string in a module."
                )


class _Mark:
    """A value with a mark: if the mark is another, the value has changed."""

    def __init__(self, thing: Any, mark: Any) -> None:
        self.thing, self.mark = thing, mark

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and other.mark == self.mark

    __hash__ = None  # type: ignore[assignment]


def _kinds_of(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__qualname__ for name, module in model.named_modules()}


def _stamp(model: nn.Module) -> list[tuple[Any, ...]]:
    """List the attributes of all modules; it holds them, so that no other takes their place."""
    stamp, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        stamp.append((*module.__dict__, *module.__dict__.values()))
        waiting += [child for child in module._modules.values() if child is not None]
    return stamp


def _is_same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    """Return whether two stamps hold the same objects."""
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(one, other, strict=True)
    )


def _find_changes(before: Values, now: Values) -> set[str]:
    return {
        path
        for path, value in now.items()
        if (old := before.get(path, _ABSENT)) is not value
        and not (type(old) is type(value) and old == value)
    }


def _read(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of all modules by their full names."""
    ids: set[int] = set()  # of objects that were read already
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in module.__dict__.items():
            if key not in _INTERNAL:
                if type(value) in _PLAIN:  # the most frequent case
                    yield prefix + key, value
                else:
                    yield from _read_value(value, prefix + key, _DEPTH, ids)


def _read_value(value: Any, path: str, depth: int, ids: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield a value with its mark, and the attributes of an object."""
    if type(value) in _PLAIN:
        yield path, value
    elif isinstance(value, nn.Module | nn.Parameter) or id(value) in ids:
        return
    elif isinstance(value, _CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
        if len(value) <= _MAX_ITEMS and not any(isinstance(v, _SAVED_ELSEWHERE) for v in items):
            yield path, _Mark(value, _mark(value))
    elif _is_object(value):
        ids.add(id(value))
        yield path, _Mark(value, type(value))
        for key, inner in list(vars(value).items()) if depth else ():
            yield from _read_value(inner, f"{path}.{key}", depth - 1, ids)
    else:
        yield path, _Mark(value, _mark(value))


def _mark(value: Any, depth: int = _DEPTH) -> Any:
    """Build a comparable mark that changes when the value changes."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple | deque) and depth:
        return [_mark(item, depth - 1) for item in value]
    if isinstance(value, dict) and depth:
        return [(key, _mark(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, np.generic | np.ndarray) and value.size <= _MAX_ITEMS:
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Tensor) and not value.is_inference():
        return (id(value), value._version)
    return id(value)


def _is_object(value: Any) -> bool:
    """Return whether a value is an object of the user's, such as a configuration."""
    home = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not (
        isinstance(value, type | ModuleType)
        or home == "torch"
        or home in sys.stdlib_module_names - {"__main__", "argparse", "types"}
    )


def _write(model: nn.Module, path: str, value: Any) -> None:
    """Set an attribute by its full name."""
    *owners, key = path.split(".")
    owner: Any = model
    for name in owners:  # only attributes of modules and objects, never those of classes
        owner = {**getattr(owner, "_modules", {}), **getattr(owner, "__dict__", {})}.get(name)
    if owner is None or key in _INTERNAL or key.startswith("__"):
        raise RunError(
            f"The checkpoint holds {path}. This model has no such attribute that the body of a "
            f"loop could have changed. Build the model as it was when the run began."
        )
    old = getattr(owner, key, None)
    if isinstance(old, Tensor) and isinstance(value, Tensor):
        value = value.to(old.device)
    try:
        setattr(owner, key, value)
    except (AttributeError, TypeError) as error:
        raise RunError(
            f"The checkpoint holds {path}, which the loop's body has changed, and it cannot be set "
            f"in this model: {error}. Build the model as it was when the run began."
        ) from error


def _regroup(
    optimizer: Any, parameters: Mapping[str, Tensor], groups: list[list[str]] | None
) -> None:
    """Restore the groups of an optimiser; its state and settings are loaded later."""
    current = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    if groups is None or not all(name in parameters for group in groups for name in group):
        return
    saved = [[parameters[name] for name in group] for group in groups]
    if current != [[id(p) for p in group] for group in saved]:
        first = optimizer.param_groups[0]
        optimizer.param_groups[:] = [{**first, "params": group} for group in saved]


class OutsideModules:
    """Modules that the losses use and that neither the model nor the state of a run holds.

    Args:
        state: the user's objects in checkpoints.
    """

    def __init__(self, model: nn.Module, objective: Objective, state: Mapping[str, Any]) -> None:
        saved = {id(module) for thing in state.values() for module in _list_modules(thing)}
        modules = find_modules(objective.example_losses, model)
        self._modules = {name: m for name, m in modules.items() if id(m) not in saved}
        self._versions = self._count_versions()

    def check(self) -> None:
        """Raise if a module has changed since the run began.

        Raises:
            RunError: no checkpoint would hold the module.
        """
        for name, version in self._count_versions().items():
            if version != self._versions[name]:
                raise RunError(
                    f"The module {name!r}, which example_losses uses, has changed during the run, "
                    f"and no checkpoint holds it: a resumed run would go on with another one. "
                    f"Pass steps(..., state={{{name!r}: ...}}) with it."
                )

    def _count_versions(self) -> dict[str, int]:
        return {
            name: sum_versions([*module.parameters(), *module.buffers()])
            for name, module in self._modules.items()
        }


def _list_modules(thing: Any) -> list[nn.Module]:
    """List all modules that an object of the state holds."""
    things = [thing, *getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, dict | list | deque):  # each of its objects has a state
        things += list(thing.values() if isinstance(thing, dict) else thing)
    return [m for inner in things if isinstance(inner, nn.Module) for m in inner.modules()]
