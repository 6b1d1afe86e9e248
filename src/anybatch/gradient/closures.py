"""Modules and tensors that a function uses without being given them: a critic, a teacher.

A function finds them in its closure, its globals, its defaults, the arguments of a `partial`, or
the object that it is a method of. Functions that it calls by such a name are searched too.
"""

import dis
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from anybatch.gradient.attributes import keep, put_back

__all__ = ["closure_of", "contents_kept", "modules_used_by", "tensors_used_by"]

_DEPTH = 4  # calls from function to function, and containers, that are followed
_SEARCHED = (nn.Module, Tensor, FunctionType, MethodType, partial, dict, list, tuple)
"""Types of global names that are followed."""
_MOST = 100  # items of a container that is searched: longer ones hold data


def modules_used_by(function: Callable[..., Any], model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules besides the model that a function uses, by the names that it has for them.

    Returns:
        Outermost modules only. One that contains the model, such as the object whose method the
        function is, gives those of its children that do not.
    """
    found: dict[str, nn.Module] = {}
    own = {id(module) for module in model.modules()}
    for name, module in _search("", function, _DEPTH, set()):
        if not isinstance(module, nn.Module):
            continue
        for child, part in _parts_without(name, module, own):
            if id(part) not in own:
                found[child] = part
                own |= {id(inner) for inner in part.modules()}
    return found


def tensors_used_by(function: Callable[..., Any]) -> dict[str, Tensor]:
    """Find the tensors that a function uses without being given them, by their names."""
    found = _search("", function, _DEPTH, set())
    return {name: thing for name, thing in found if isinstance(thing, Tensor)}


@contextmanager
def contents_kept(functions: Iterable[Any]) -> Iterator[None]:
    """Put back what functions have done to the variables and objects that they hold."""
    functions = list(functions)
    bare = [one for one in map(_bare, functions) if isinstance(one, FunctionType)]
    cells = [(cell, _cell(cell)) for one in bare for cell in one.__closure__ or ()]
    globals_of = [(one.__globals__, name) for one in bare for name in _global_names(one.__code__)]
    bound = [(scope, name, scope[name]) for scope, name in globals_of if name in scope]
    own = [one for function in functions for one in _objects(function)]
    held = keep([value for _, value in cells] + [value for *_, value in bound] + own)
    try:
        yield
    finally:
        for cell, value in cells:
            if _cell(cell) is not value:
                cell.cell_contents = value
        for scope, name, value in bound:
            if scope.get(name) is not value:
                scope[name] = value
        put_back(held)


def _objects(function: Any) -> Iterator[Any]:
    """Yield the objects whose state a function can change: those it is bound to, and itself."""
    if isinstance(function, partial):
        yield from (*function.args, *function.keywords.values())
        yield from _objects(function.func)
    elif isinstance(function, MethodType):
        yield function.__self__
    else:
        yield function.__dict__ if isinstance(function, FunctionType) else function


def _bare(function: Any) -> Any:
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    return function


def _cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def closure_of(function: FunctionType) -> list[Any]:
    """List what a function's free variables hold; None for one that is not bound yet."""
    return [_cell(cell) for cell in function.__closure__ or ()]


def _search(
    name: str, thing: Any, depth: int, seen: set[int]
) -> Iterator[tuple[str, nn.Module | Tensor]]:
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module | Tensor):
        yield name or type(thing).__name__, thing
        return
    for inner, value in _contents(thing):
        yield from _search(inner, value, depth - 1, seen)


def _contents(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function, an object with a call, or a container holds, by name."""
    if isinstance(thing, FunctionType):
        if not thing.__module__ or thing.__module__.split(".")[0] not in ("torch", "anybatch"):
            yield from _names_in(thing)
    elif isinstance(thing, MethodType):
        yield "", thing.__func__
        if isinstance(thing.__self__, nn.Module):
            yield "self", thing.__self__
        elif isinstance(thing.__func__, FunctionType):
            yield from _attributes_in(thing.__self__, _attribute_names(thing.__func__.__code__))
    elif isinstance(thing, partial):
        yield "", thing.func
        yield from ((f"argument {i}", value) for i, value in enumerate(thing.args))
        yield from thing.keywords.items()
    elif isinstance(thing, dict) and len(thing) <= _MOST:
        yield from ((str(key), value) for key, value in thing.items())
    elif isinstance(thing, list | tuple) and len(thing) <= _MOST:
        yield from ((f"item {i}", value) for i, value in enumerate(thing))
    elif callable(thing) and isinstance(type(thing).__call__, FunctionType):
        yield "", MethodType(type(thing).__call__, thing)


def _names_in(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    named = dict(zip(code.co_freevars, closure_of(function), strict=True))
    named |= {name: function.__globals__.get(name) for name in _global_names(code)}
    named |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    named |= function.__kwdefaults__ or {}
    attributes = _attribute_names(code)
    for name, value in named.items():
        if isinstance(value, _SEARCHED) or callable(value):
            yield name, value
        yield from _attributes_in(value, attributes)


def _attributes_in(thing: Any, names: Collection[str], depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a plain object, such as a trainer, that code mentions."""
    if isinstance(thing, (*_SEARCHED, type, ModuleType)):
        return
    own = getattr(thing, "__dict__", {})
    for name in names:
        method = getattr(type(thing), name, None)
        if name in own:
            yield name, own[name]
            if depth:
                yield from _attributes_in(own[name], names, depth - 1)
        elif isinstance(method, FunctionType):
            yield name, MethodType(method, thing)


def _global_names(code: CodeType) -> Iterator[str]:
    return _names(code, ("LOAD_GLOBAL", "LOAD_NAME"))


def _attribute_names(code: CodeType) -> set[str]:
    return set(_names(code, ("LOAD_ATTR", "LOAD_METHOD")))


def _names(code: CodeType, kinds: Collection[str]) -> Iterator[str]:
    yield from {i.argval for i in dis.get_instructions(code) if i.opname in kinds}
    for constant in code.co_consts:  # functions and comprehensions inside
        if isinstance(constant, CodeType):
            yield from _names(constant, kinds)


def _parts_without(name: str, module: nn.Module, own: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the module itself, or its children where it contains a module of the model."""
    if id(module) in own:
        return
    if own.isdisjoint(map(id, module.modules())):
        yield name, module
        return
    for child, part in module.named_children():
        yield from _parts_without(f"{name}.{child}", part, own)
