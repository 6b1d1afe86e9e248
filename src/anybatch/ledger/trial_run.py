"""Puts back what a trial run of somebody's code has left in Python objects.

The trial runs of the ledger call the model's forward pass, its hooks and the losses. These may
count their calls, collect features, or keep a state in an attribute. All that can be changed and is
reachable from them is copied one level deep before, and put back where it is no longer the same:
attributes, lists, dicts and sets, variables of functions, tensors, and random generators.
Parameters and buffers are left to the caller. Files and what is printed stay, and so does an
iterator that has moved on.

A look at a forward pass: the narrowest type that it computes in, and whether it draws.
"""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch.randomness import States

__all__ = ["Look", "remember"]

_MOST = 20_000
"""Objects that are looked at: a data set that hangs on a trainer is not searched to its end."""
_MOST_ELEMENTS = 2**24
"""Elements of tensors that are copied, all together."""
_FOREIGN = {"torch", "numpy", "anybatch", "builtins", "functools", "weakref"}
"""Packages whose objects are left alone, but for modules and containers."""
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
Restore = Callable[[], None]


def remember(roots: Iterable[Any], spared: Iterable[Tensor]) -> Restore:
    """Return a function that puts back what is reachable from some objects, any number of times.

    Args:
        roots: models, functions and other objects.
        spared: tensors that the caller looks after.
    """
    seen: dict[int, Any] = {id(x): x for x in spared}  # held, so that no id is used twice
    todo, restores, num_elements = list(roots), [], 0
    while todo and len(seen) < _MOST:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        num_elements += x.numel() if isinstance(x, Tensor) else 0
        num_elements += x.size if isinstance(x, np.ndarray) else 0
        if isinstance(x, Tensor | np.ndarray) and num_elements > _MOST_ELEMENTS:
            continue
        restore = _restore_of(x)
        if restore is not None:
            restores.append(restore)
        todo += [inner for inner in _inside(x) if type(inner) not in _ATOMS]

    def restore_all() -> None:
        for restore in restores:
            restore()

    return restore_all


def _restore_of(x: Any) -> Restore | None:
    """What puts one object back; None: it cannot be changed, or not by us."""
    if isinstance(x, Tensor):
        return _restore_tensor(x)
    if type(x) in (dict, OrderedDict, defaultdict, Counter):
        return partial(_put_into_dict, x, dict(x))
    if type(x) in (list, deque, set):
        return partial(_put_into, x, list(x))
    if isinstance(x, CellType):
        return partial(setattr, x, "cell_contents", x.cell_contents)
    if isinstance(x, type) and _is_own(x):
        return partial(_put_into_class, x, _variables(vars(x)))
    if isinstance(x, np.ndarray) and x.flags.writeable:
        return partial(np.copyto, x, x.copy())
    if isinstance(x, torch.Generator):
        return _nothing(x.set_state, x.get_state())
    if isinstance(x, random.Random):
        return partial(x.setstate, x.getstate())
    if isinstance(x, np.random.Generator):
        return partial(setattr, x.bit_generator, "state", x.bit_generator.state)
    if isinstance(x, FunctionType) and _is_own(x):
        return partial(_put_into_dict, x.__globals__, _globals(x), is_whole=False)
    return None


def _nothing(function: Callable[..., object], *args: Any) -> Restore:
    """A call whose result nobody needs."""

    def call() -> None:
        function(*args)

    return call


def _inside(x: Any) -> Iterator[Any]:
    """The objects that one leads to."""
    if isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, list | tuple | deque | set):
        yield from x
    elif isinstance(x, CellType):
        yield x.cell_contents
    elif isinstance(x, MethodType):
        yield from (x.__self__, x.__func__)
    elif isinstance(x, partial):
        yield from (x.func, x.args, x.keywords)
    elif isinstance(x, FunctionType):
        yield from (cell for cell in x.__closure__ or () if _is_filled(cell))
        yield from (x.__defaults__, x.__kwdefaults__, x.__dict__)
        yield from _globals(x).values() if _is_own(x) else ()
    elif isinstance(x, type):
        yield from (*_variables(vars(x)).values(), *x.__bases__) if _is_own(x) else ()
    elif isinstance(x, nn.Module) or _is_own(x):
        yield from (getattr(x, "__dict__", None), type(x))


def _is_own(x: Any) -> bool:
    """Whether it is the user's: of no package that this file knows."""
    home = x.__module__ if isinstance(x, FunctionType | type) else type(x).__module__
    return isinstance(home, str) and home.partition(".")[0] not in _FOREIGN


def _globals(function: FunctionType) -> dict[str, Any]:
    """The variables of its module that a function names."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return _variables(named)


def _variables(named: Mapping[str, Any]) -> dict[str, Any]:
    """Those names that are no functions, classes or modules."""
    kinds = (int, float, Tensor, np.ndarray, dict, list, deque, set)
    return {
        name: x
        for name, x in named.items()
        if isinstance(x, kinds) or (_is_own(x) and hasattr(x, "__dict__") and not callable(x))
    }


def _put_into_class(x: type, before: Mapping[str, Any]) -> None:
    for name, value in before.items():
        if vars(x).get(name, x) is not value:
            setattr(x, name, value)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not set yet
        return False


def _put_into_dict(x: dict[Any, Any], before: dict[Any, Any], *, is_whole: bool = True) -> None:
    if is_whole:
        for key in [key for key in x if key not in before]:
            del x[key]
    for key, value in before.items():
        if x.get(key, x) is not value:
            x[key] = value


def _put_into(x: Any, before: list[Any]) -> None:
    if len(x) == len(before) and all(a is b for a, b in zip(x, before, strict=True)):
        return
    x.clear()
    (x.update if isinstance(x, set) else x.extend)(before)


def _restore_tensor(x: Tensor) -> Restore | None:
    if type(x) is not Tensor or x.layout != torch.strided or x.is_inference() or not x.is_leaf:
        return None
    before, version = x.detach().clone(), x._version

    @torch.no_grad()
    def restore() -> None:
        nonlocal version
        if x._version != version:
            x.copy_(before)
            version = x._version

    return restore


class Look(TorchFunctionMode):
    """Sees the narrowest type that a forward pass computes in, and whether it draws."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.eps, self.draws = 0.0, False
        self._device = device

    def __enter__(self) -> Self:
        self._states = States.now(self._device, others=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.draws |= self._states.drawn(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            kind = result.device.type
            can_narrow = torch.amp.is_autocast_available(kind)
            if can_narrow and torch.is_autocast_enabled(kind):  # inside one call too, as in a GRU
                self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return result
