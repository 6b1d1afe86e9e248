"""Python attributes of modules that a forward pass changes: `self.hidden = h`, `self.calls += 1`.

They are state like buffers, but no checkpoint holds them, and each micro-batch changes them. An
attribute is watched with all that it holds: containers, arrays, tensors, and plain objects.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Attributes", "Change", "keep", "put_back"]

_OWN = set(nn.Module().__dict__)  # of every module: registries of parameters, hooks and the like
_FAR = (10, 10**3, 10**6)  # times that a counter goes on
_DEPTH = 4  # containers in containers that are followed
_MOST = 1000  # items of a container, or elements of an array: larger ones hold data
_OPAQUE = (nn.Module, nn.Parameter, type, FunctionType, MethodType, ModuleType)
_ABSENT: Any = object()


class _Snapshot(NamedTuple):
    """A thing that can change, and what it held."""

    thing: Any
    content: Any


class Change(NamedTuple):
    """An attribute that is other than it was, and what it holds now."""

    module: nn.Module
    key: str
    value: Any
    held: list[_Snapshot]

    def apply(self) -> None:
        """Give the attribute this value, and all that it holds the content of that time."""
        put_back(self.held)
        if self.value is _ABSENT:
            self.module.__dict__.pop(self.key, None)
        else:
            self.module.__dict__[self.key] = self.value


class Attributes:
    """Attributes of all modules of a model, as they are at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._before = {name: _attributes(module) for name, module in self._modules.items()}

    def changed(self) -> dict[str, Change]:
        """Find the attributes that are other than they were, by their full names."""
        found = {}
        for name, module in self._modules.items():
            before = self._before[name]
            for key in (before.keys() | module.__dict__.keys()) - _OWN:
                value = module.__dict__.get(key, _ABSENT)
                if key not in before or _is_changed(before[key], value):
                    found[f"{name}.{key}".lstrip(".")] = Change(module, key, value, keep(value))
        return found

    def restore(self) -> None:
        """Put all attributes back."""
        for name, module in self._modules.items():
            before = self._before[name]
            for key in module.__dict__.keys() - before.keys() - _OWN:
                del module.__dict__[key]
            for change in before.values():
                change.apply()

    def far(self, change: Change) -> Iterator[Change]:
        """Yield what the numbers of a change may become later, such as at the end of a warm-up."""
        name = next(name for name, module in self._modules.items() if module is change.module)
        before = self._before[name].get(change.key)
        if before is None:
            return
        old = {id(kept.thing): kept.content for kept in before.held}
        for times in _FAR:
            value = _far(before.value, change.value, times)
            held = [
                _Snapshot(thing, _far(old.get(id(thing)), content, times))
                for thing, content in change.held
            ]
            pairs = zip([value, *held], [change.value, *change.held], strict=True)
            if any(moved is not now for moved, now in pairs):
                yield change._replace(value=value, held=held)


def _attributes(module: nn.Module) -> dict[str, Change]:
    return {
        key: Change(module, key, value, keep(value))
        for key, value in module.__dict__.items()
        if key not in _OWN
    }


def _is_changed(before: Change, value: Any) -> bool:
    """Whether an attribute is another thing, or holds other things."""
    if not _is_same(value, before.value):
        return True
    return any(not _is_equal(_content(kept.thing), kept.content) for kept in before.held)


def keep(value: Any) -> list[_Snapshot]:
    """Copy what a value holds, container by container."""
    found, seen, todo = [], set(), [(value, _DEPTH)]
    while todo:
        thing, depth = todo.pop()
        content = _content(thing)
        if content is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        found.append(_Snapshot(thing, content))
        if depth:
            todo += [(inner, depth - 1) for inner in _items(content)]
    return found


def put_back(held: list[_Snapshot]) -> None:
    """Give things the content that they held."""
    for thing, content in held:
        if not _is_equal(_content(thing), content):
            _set_content(thing, content)


def _content(thing: Any) -> Any:
    """Copy what a thing holds that can change in place; None for what cannot, or is too large."""
    if isinstance(thing, _OPAQUE):
        return None
    if isinstance(thing, Tensor):
        is_small = not thing.is_meta and thing.layout == torch.strided and thing.numel() <= _MOST
        return thing.detach().clone() if is_small else None
    if isinstance(thing, np.ndarray):
        return thing.copy() if thing.size <= _MOST and thing.dtype != object else None
    if isinstance(thing, list | dict | set | deque):
        return thing.copy() if len(thing) <= _MOST else None
    if isinstance(thing, tuple):
        return thing if len(thing) <= _MOST else None
    own = getattr(thing, "__dict__", None)
    return dict(own) if isinstance(own, dict) and len(own) <= _MOST else None


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


def _items(content: Any) -> list[Any]:
    if isinstance(content, Tensor | np.ndarray):
        return []
    values = content.values() if isinstance(content, dict) else content
    return list(islice(values, _MOST))


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
    """Compare two copies of what a thing holds."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    return _is_same(a, b)


def _far(before: Any, after: Any, times: int) -> Any:
    """Let what has changed from before to after go on; the same object where nothing has."""
    if _is_number(before) and _is_number(after):
        return after if after == before else before + times * (after - before)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        is_counter = before.shape == after.shape and before.dtype == after.dtype != torch.bool
        if not is_counter or _is_equal(before, after):
            return after
        return before + times * (after - before)
    if type(before) is not type(after):
        return after
    if isinstance(after, dict):
        far = {key: _far(before.get(key), value, times) for key, value in after.items()}
        return far if any(far[key] is not after[key] for key in after) else after
    if isinstance(after, list) and len(before) == len(after):
        items = [_far(a, b, times) for a, b in zip(before, after, strict=True)]
        return items if any(a is not b for a, b in zip(items, after, strict=True)) else after
    return after


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
