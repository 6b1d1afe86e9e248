"""Python attributes of modules that a forward pass changes: `self.hidden = h`, `self.calls += 1`.

They are state like buffers, but no checkpoint holds them, and each micro-batch changes them. An
attribute is watched with all its contents: containers, arrays, tensors, and plain objects.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Attribute", "Attributes", "restore_contents", "snapshot_contents"]

_REGISTRIES = set(nn.Module().__dict__)  # attributes of every module: parameters, hooks, ...
_STEPS = (10, 10**3, 10**6)  # a counter is tried after so many further forward passes
_DEPTH = 4  # levels of nested containers that are followed
_MAX_ITEMS = 1000  # of a container or an array: larger ones hold data
_OPAQUE = (nn.Module, nn.Parameter, type, FunctionType, MethodType, ModuleType)
_ABSENT: Any = object()


class _Snapshot(NamedTuple):
    """A thing that can change, and a copy of its content."""

    thing: Any
    content: Any


class Attribute(NamedTuple):
    """Value of an attribute at one moment, with a copy of its contents."""

    module: nn.Module
    key: str
    value: Any
    contents: list[_Snapshot]

    def restore(self) -> None:
        """Set the attribute to this value, and all its contents to their copies."""
        restore_contents(self.contents)
        if self.value is _ABSENT:
            self.module.__dict__.pop(self.key, None)
        else:
            self.module.__dict__[self.key] = self.value


class Attributes:
    """Attributes of all modules of a model, at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._before = {name: _read_attributes(module) for name, module in self._modules.items()}

    def find_changes(self) -> dict[str, Attribute]:
        """Find the attributes that have changed since, by full name; return them as they are."""
        changes = {}
        for name, module in self._modules.items():
            before = self._before[name]
            for key in (before.keys() | module.__dict__.keys()) - _REGISTRIES:
                value = module.__dict__.get(key, _ABSENT)
                if key not in before or _has_changed(before[key], value):
                    full_name = f"{name}.{key}".lstrip(".")
                    changes[full_name] = Attribute(module, key, value, snapshot_contents(value))
        return changes

    def restore(self) -> None:
        """Restore all attributes."""
        for name, module in self._modules.items():
            before = self._before[name]
            for key in module.__dict__.keys() - before.keys() - _REGISTRIES:
                del module.__dict__[key]
            for attribute in before.values():
                attribute.restore()

    def extrapolate(self, change: Attribute) -> Iterator[Attribute]:
        """Yield values that the numbers of a change may reach later, as after a warm-up."""
        name = next(name for name, module in self._modules.items() if module is change.module)
        before = self._before[name].get(change.key)
        if before is None:
            return
        old = {id(snapshot.thing): snapshot.content for snapshot in before.contents}
        for steps in _STEPS:
            value = _extrapolate(before.value, change.value, steps)
            contents = [
                _Snapshot(thing, _extrapolate(old.get(id(thing)), content, steps))
                for thing, content in change.contents
            ]
            pairs = zip([value, *contents], [change.value, *change.contents], strict=True)
            if any(later is not now for later, now in pairs):
                yield change._replace(value=value, contents=contents)


def _read_attributes(module: nn.Module) -> dict[str, Attribute]:
    return {
        key: Attribute(module, key, value, snapshot_contents(value))
        for key, value in module.__dict__.items()
        if key not in _REGISTRIES
    }


def _has_changed(before: Attribute, value: Any) -> bool:
    """Return whether an attribute is another thing, or has other contents."""
    if not _is_same(value, before.value):
        return True
    return any(not _is_equal(_copy_content(s.thing), s.content) for s in before.contents)


def snapshot_contents(value: Any) -> list[_Snapshot]:
    """Copy the contents of a value, container by container."""
    snapshots, visited, waiting = [], set(), [(value, _DEPTH)]
    while waiting:
        thing, depth = waiting.pop()
        content = _copy_content(thing)
        if content is None or id(thing) in visited:
            continue
        visited.add(id(thing))
        snapshots.append(_Snapshot(thing, content))
        if depth:
            waiting += [(inner, depth - 1) for inner in _list_items(content)]
    return snapshots


def restore_contents(snapshots: list[_Snapshot]) -> None:
    """Restore the contents of things."""
    for thing, content in snapshots:
        if not _is_equal(_copy_content(thing), content):
            _set_content(thing, content)


def _copy_content(thing: Any) -> Any:
    """Copy the content of a thing that can change in place; None if it cannot, or is too large."""
    if isinstance(thing, _OPAQUE):
        return None
    if isinstance(thing, Tensor):
        is_small = (
            not thing.is_meta and thing.layout == torch.strided and thing.numel() <= _MAX_ITEMS
        )
        return thing.detach().clone() if is_small else None
    if isinstance(thing, np.ndarray):
        return thing.copy() if thing.size <= _MAX_ITEMS and thing.dtype != object else None
    if isinstance(thing, list | dict | set | deque):
        return thing.copy() if len(thing) <= _MAX_ITEMS else None
    if isinstance(thing, tuple):
        return thing if len(thing) <= _MAX_ITEMS else None
    attributes = getattr(thing, "__dict__", None)
    if not isinstance(attributes, dict) or len(attributes) > _MAX_ITEMS:
        return None
    return dict(attributes)


def _set_content(thing: Any, content: Any) -> None:
    if isinstance(thing, Tensor):
        thing.detach().copy_(content)
    elif isinstance(thing, np.ndarray):
        thing[...] = content
    elif isinstance(thing, list):
        thing[:] = content
    elif isinstance(thing, set | dict):
        thing.clear()
        thing.update(content)
    elif isinstance(thing, deque):
        thing.clear()
        thing.extend(content)
    elif not isinstance(thing, tuple):
        thing.__dict__.clear()
        thing.__dict__.update(content)


def _list_items(content: Any) -> list[Any]:
    if isinstance(content, Tensor | np.ndarray):
        return []
    values = content.values() if isinstance(content, dict) else content
    return list(islice(values, _MAX_ITEMS))


def _is_same(a: Any, b: Any) -> bool:
    """Compare numbers by value, containers item by item, and all else by identity."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, set):
        return bool(a == b)
    return isinstance(a, int | float | complex | str) and repr(a) == repr(b)


def _is_equal(a: Any, b: Any) -> bool:
    """Compare two copies of the content of a thing."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    return _is_same(a, b)


def _extrapolate(before: Any, after: Any, steps: int) -> Any:
    """Continue a change by many steps; return the same object if nothing has changed."""
    if _is_number(before) and _is_number(after):
        return after if after == before else before + steps * (after - before)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        is_counter = before.shape == after.shape and before.dtype == after.dtype != torch.bool
        if not is_counter or _is_equal(before, after):
            return after
        return before + steps * (after - before)
    if type(before) is not type(after):
        return after
    if isinstance(after, dict):
        later = {key: _extrapolate(before.get(key), value, steps) for key, value in after.items()}
        return later if any(later[key] is not after[key] for key in after) else after
    if isinstance(after, list) and len(before) == len(after):
        items = [_extrapolate(a, b, steps) for a, b in zip(before, after, strict=True)]
        return items if any(a is not b for a, b in zip(items, after, strict=True)) else after
    return after


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
