"""Find the modules and tensors that a function uses besides its arguments: a critic, a teacher.

A function reaches them through its closure, its globals, its defaults, the arguments of a
`partial`, or the object whose method it is. Functions that it calls by such a name are searched
too.
"""

import dis
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from anybatch.errors import ModelError
from anybatch.gradient.attributes import restore_contents, snapshot_contents

__all__ = ["check_leaves", "find_modules", "list_closure", "preserve_contents"]

_DEPTH = 4  # calls from function to function, and containers, that are followed
_SEARCHED = (nn.Module, Tensor, FunctionType, MethodType, partial, dict, list, tuple)
"""Types of global names that are followed."""
_MAX_ITEMS = 100  # of a container that is searched: longer ones hold data


def find_modules(function: Callable[..., Any], model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules besides the model that a function uses, by the names that it has for them.

    Returns:
        Outermost modules only. Of a module that contains the model, such as the object whose
        method the function is, those children that do not.
    """
    modules: dict[str, nn.Module] = {}
    visited = {id(module) for module in model.modules()}
    for name, module in _search("", function, _DEPTH, set()):
        if not isinstance(module, nn.Module):
            continue
        for child_name, child in _split_module(name, module, visited):
            if id(child) not in visited:
                modules[child_name] = child
                visited |= {id(inner) for inner in child.modules()}
    return modules


def check_leaves(
    values: Iterable[Tensor], modules: Iterable[nn.Module], example_losses: Callable[..., Any]
) -> None:
    """Refuse losses that depend on a trainable tensor which would get no gradient.

    Tensors that the losses create themselves, to differentiate by them, are allowed.

    Args:
        values: losses, with their graph.
        modules: the model, and outside modules such as a critic: somebody else trains these.
        example_losses: function that computed the losses.

    Raises:
        ModelError: a parameter that none of the modules holds.
    """
    parameters = {id(p) for module in modules for p in module.parameters()}
    names = {
        id(thing): name
        for name, thing in _search("", example_losses, _DEPTH, set())
        if isinstance(thing, Tensor)
    }
    for leaf in _iterate_leaves(values):
        is_used = id(leaf) in names or isinstance(leaf, nn.Parameter)
        if is_used and id(leaf) not in parameters:
            kind = f"tensor {names[id(leaf)]!r}" if id(leaf) in names else "parameter"
            raise ModelError(
                f"The losses depend on a trainable {kind} of shape {tuple(leaf.shape)} that is no "
                f"parameter of the model, and would get no gradient. Make it one, such as by "
                f"model.register_parameter, or use its detach() in the loss."
            )


def _iterate_leaves(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """Walk through a graph to the tensors that gradients are accumulated in."""
    waiting: list[Any] = [get_gradient_edge(v).node for v in values if v.requires_grad]
    visited = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in visited:
                visited.add(next_node)
                waiting.append(next_node)


@contextmanager
def preserve_contents(functions: Iterable[Any]) -> Iterator[None]:
    """Restore the variables and objects that functions hold at the end of a block."""
    functions = list(functions)
    bare = [one for one in map(_unwrap, functions) if isinstance(one, FunctionType)]
    cells = [(cell, _read_cell(cell)) for one in bare for cell in one.__closure__ or ()]
    globals_of = [(one.__globals__, name) for one in bare for name in _global_names(one.__code__)]
    variables = [(scope, name, scope[name]) for scope, name in globals_of if name in scope]
    objects = [thing for function in functions for thing in _objects(function)]
    values = [value for _, value in cells] + [value for *_, value in variables]
    snapshots = snapshot_contents(values + objects)
    try:
        yield
    finally:
        for cell, value in cells:
            if _read_cell(cell) is not value:
                cell.cell_contents = value
        for scope, name, value in variables:
            if scope.get(name) is not value:
                scope[name] = value
        restore_contents(snapshots)


def _objects(function: Any) -> Iterator[Any]:
    """Yield the objects whose state a function can change: its arguments, and itself."""
    if isinstance(function, partial):
        yield from (*function.args, *function.keywords.values())
        yield from _objects(function.func)
    elif isinstance(function, MethodType):
        yield function.__self__
    else:
        yield function.__dict__ if isinstance(function, FunctionType) else function


def _unwrap(function: Any) -> Any:
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    return function


def _read_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def list_closure(function: FunctionType) -> list[Any]:
    """List the values of a function's free variables; None for one that is not bound yet."""
    return [_read_cell(cell) for cell in function.__closure__ or ()]


def _search(
    name: str, thing: Any, depth: int, visited: set[int]
) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Yield the modules and tensors below a function or container, by name."""
    if depth == 0 or id(thing) in visited:
        return
    visited.add(id(thing))
    if isinstance(thing, nn.Module | Tensor):
        yield name or type(thing).__name__, thing
        return
    for inner, value in _contents(thing):
        yield from _search(inner, value, depth - 1, visited)


def _contents(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield the contents of a function, a callable object, or a container, by name."""
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
    elif isinstance(thing, dict) and len(thing) <= _MAX_ITEMS:
        yield from ((str(key), value) for key, value in thing.items())
    elif isinstance(thing, list | tuple) and len(thing) <= _MAX_ITEMS:
        yield from ((f"item {i}", value) for i, value in enumerate(thing))
    elif callable(thing) and isinstance(type(thing).__call__, FunctionType):
        yield "", MethodType(type(thing).__call__, thing)


def _names_in(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    values = dict(zip(code.co_freevars, list_closure(function), strict=True))
    values |= {name: function.__globals__.get(name) for name in _global_names(code)}
    values |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    values |= function.__kwdefaults__ or {}
    attributes = _attribute_names(code)
    for name, value in values.items():
        if isinstance(value, _SEARCHED) or callable(value):
            yield name, value
        yield from _attributes_in(value, attributes)


def _attributes_in(thing: Any, names: Collection[str], depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a plain object, such as a trainer, that code mentions."""
    if isinstance(thing, (*_SEARCHED, type, ModuleType)):
        return
    attributes = getattr(thing, "__dict__", {})
    for name in names:
        method = getattr(type(thing), name, None)
        if name in attributes:
            yield name, attributes[name]
            if depth:
                yield from _attributes_in(attributes[name], names, depth - 1)
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


def _split_module(
    name: str, module: nn.Module, visited: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the module itself, or its children if it contains a module of the model."""
    if id(module) in visited:
        return
    if visited.isdisjoint(map(id, module.modules())):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _split_module(f"{name}.{child_name}", child, visited)
