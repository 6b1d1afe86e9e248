"""Python attributes of modules that a forward pass changes: `self.hidden = h`, `self.calls += 1`.

They are state like buffers, but no checkpoint holds them, and each micro-batch changes them.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Attributes"]

_OWN = set(nn.Module().__dict__)  # of every module: registries of parameters, hooks and the like
_FAR = (10, 10**3, 10**6)  # times that a counter goes on


class Attributes:
    """Attributes of all modules of a model, as they are at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (name, module, key, value, _shallow(value), _content(value))
            for name, module in model.named_modules()
            for key, value in _attributes(module)
        ]
        self._keys = [(m, set(m.__dict__)) for m in model.modules()]

    def changed(self) -> dict[str, tuple[nn.Module, str]]:
        """Find the attributes that are other than they were, by their full names."""
        found = {}
        for name, module, key, _, _, content in self._kept:
            if key not in module.__dict__ or _content(module.__dict__[key]) != content:
                found[f"{name}.{key}" if name else key] = module, key
        for module, keys in self._keys:
            for key in set(module.__dict__) - keys - _OWN:
                found[f"{type(module).__name__}.{key}"] = module, key
        return found

    def restore(self) -> None:
        """Put all attributes back."""
        for module, keys in self._keys:
            for key in set(module.__dict__) - keys:
                del module.__dict__[key]
        for _, module, key, value, shallow, _ in self._kept:
            if isinstance(value, list):
                value[:] = shallow
            elif isinstance(value, dict | set):
                value.clear()
                value.update(shallow)
            module.__dict__[key] = value

    def far_values(self, module: nn.Module, key: str, after: Any) -> list[Any]:
        """List what a number may become that a forward pass has changed; nothing for all else.

        A counter may matter only later, such as at the end of a warm-up.
        """
        for _, other, name, before, _, _ in self._kept:
            if other is module and name == key and _is_number(before) and _is_number(after):
                return [before + times * (after - before) for times in _FAR]
        return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in module.__dict__.items() if key not in _OWN)


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else value


def _content(value: Any) -> list[Any]:
    """Reduce an attribute to what can be compared: numbers, and identities of all else."""
    leaves = tree_leaves(value) if isinstance(value, list | dict | tuple) else [value]
    return [len(leaves), *map(_leaf, leaves)]


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return id(leaf), leaf.is_inference() or leaf._version
    if isinstance(leaf, int | float | complex | str | None):
        return repr(leaf)
    return (id(leaf), len(leaf)) if isinstance(leaf, set) else id(leaf)
