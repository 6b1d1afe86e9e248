"""Trial runs of the user's code and repeated backward passes, which leave no trace.

A trial run calls the model's forward pass, its hooks and the losses. These can count their calls,
collect features, or store a state in an attribute. `record_state` copies all that is reachable from
them and can change, one level deep, and restores it afterwards: attributes, lists, dicts and sets,
variables of functions, tensors, and random generators. The caller restores parameters and buffers.
Files, printed text and the position of an iterator are not restored.
"""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch import _torch
from anybatch.errors import AnybatchError, LedgerError
from anybatch.ledger.unplaced import UnplacedError
from anybatch.randomness import GeneratorStates

__all__ = [
    "ForwardProbe",
    "convert_errors",
    "disable_compile",
    "iterate_nodes",
    "list_leaves",
    "perturb_parameters",
    "preserve_grads",
    "record_state",
    "repeat_backward",
    "run_backward",
    "set_grads_aside",
]

_MAX_OBJECTS = 20_000
"""Limit of the search: a data set that belongs to a trainer is not searched to its end."""
_MAX_ELEMENTS = 2**24
"""Limit of the elements of copied tensors, all together."""
_FOREIGN = {"torch", "numpy", "anybatch", "builtins", "functools", "weakref"}
"""Packages whose objects are not searched, except for modules and containers."""
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_NOISE = 0.01
Restore = Callable[[], None]


class ForwardProbe(TorchFunctionMode):
    """Mode that records the narrowest type of a forward pass, and whether it draws random numbers.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.eps, self.draws = 0.0, False
        self._device = device

    def __enter__(self) -> Self:
        self._states = GeneratorStates.capture(self._device, others=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.draws |= self._states.has_changed(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            kind = result.device.type
            # Autocast can narrow inside one call, as in a GRU, and return a wide result.
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return result


@contextmanager
def convert_errors() -> Iterator[None]:
    """Convert an error of torch in a watched operation into an `UnplacedError`.

    An error of the user's own code is raised again when the examples go one at a time.
    """
    try:
        yield
    except (AnybatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnplacedError(
            f"The ledger cannot take an operation apart by example. Torch says: "
            f"{type(error).__name__}: {error}"
        ) from error


def disable_compile() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs as Python.

    The ledger sees the operations then, and can go through their graph more than once.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def perturb_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], roots: Iterable[object]
) -> Iterator[Callable[..., None]]:
    """Perturb the parameters slightly within the context, and restore everything afterwards.

    Branches that are initialised to 0 then produce gradients too. The hooks of parameters do not
    run, since they must see gradients of updates alone.

    Args:
        parameters: the trainable ones, by name.
        roots: functions and other objects that a forward pass can change.

    Yields:
        A function that restores all but the parameters, or with `parameters=True` these as well.
    """
    tensors, buffers = list(parameters.values()), list(model.buffers())
    before = {id(t): t.detach().clone() for t in (*tensors, *buffers)}
    gradients = [p.grad for p in tensors]
    hooks = [
        (hooks, dict(hooks))
        for p in tensors
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if hooks
    ]
    restore_objects = record_state([model, *roots], (*model.parameters(), *buffers))

    @torch.no_grad()
    def restore(*, parameters: bool) -> None:
        restore_objects()
        for tensor in (*buffers, *(tensors if parameters else ())):
            if not torch.equal(tensor, before[id(tensor)]):  # a write would break a graph
                tensor.copy_(before[id(tensor)])

    try:
        _add_noise(tensors)
        for current, _ in hooks:
            current.clear()
        yield restore
    finally:
        for current, original in hooks:
            current.update(original)
        restore(parameters=True)
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        for current, original in hooks:
            current.update(original)


@torch.no_grad()
def _add_noise(parameters: Iterable[nn.Parameter]) -> None:
    """Add random numbers to parameters, and clear their gradients."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        dtype = p.dtype if p.dtype.itemsize >= 4 else torch.float32
        noise = torch.randn(p.shape, generator=generator, dtype=dtype)
        p.add_(_NOISE * noise.to(p))
        p.grad = None


def run_backward(
    values: Sequence[Tensor], gradients: Sequence[Tensor], *, keeps_graph: bool = False
) -> None:
    """Run a backward pass that adds to `.grad`, by the function behind `Tensor.backward`."""
    _torch.run_backward(tuple(values), tuple(gradients), keeps_graph, False, (), True, True)


def repeat_backward(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Run a backward pass and keep its graph for another one.

    Raises:
        LedgerError: torch cannot keep it, for instance because a tensor was changed in place.
    """
    try:
        run_backward(values, gradients, keeps_graph=True)
    except RuntimeError as error:
        raise LedgerError(
            f"The ledger has to go back through the graph of the losses several times, and torch "
            f"does not allow it: {error} Leave the model unobserved."
        ) from error


@contextmanager
def preserve_grads(values: Iterable[Tensor], *, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Restore `.grad` of the leaves of a graph afterwards, except for some tensors.

    The leaves can be inputs whose gradient the user needs, or parameters outside of the model.
    """
    excluded = {id(x) for x in but}
    leaves = list_leaves(v.grad_fn for v in values)
    with set_grads_aside([x for x in leaves if id(x) not in excluded]):
        yield


@contextmanager
def set_grads_aside(leaves: list[Tensor]) -> Iterator[None]:
    """Clear `.grad` of tensors within the context, and restore it afterwards."""
    before = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    try:
        yield
    finally:
        for x, gradient in zip(leaves, before, strict=True):
            x.grad = gradient


def list_leaves(nodes: Iterable[Any]) -> list[Tensor]:
    """List the leaves of a graph, from some nodes on."""
    return [node.variable for node in iterate_nodes(nodes) if hasattr(node, "variable")]


def iterate_nodes(
    nodes: Iterable[Any], *, is_end: Callable[[Any], bool] = lambda _: False
) -> Iterator[Any]:
    """Yield each node of autograd's graph once, from some nodes up to and including the ends."""
    todo, visited = list(nodes), set()
    while todo:
        node = todo.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        if not is_end(node):
            todo += [parent for parent, _ in node.next_functions]


def record_state(roots: Iterable[Any], excluded: Iterable[Tensor]) -> Restore:
    """Return a function that restores all that is reachable from some objects, any number of times.

    Args:
        roots: models, functions and other objects.
        excluded: tensors that the caller restores.
    """
    visited: dict[int, Any] = {id(x): x for x in excluded}  # references keep the ids valid
    todo, restores, num_elements = list(roots), [], 0
    while todo and len(visited) < _MAX_OBJECTS:
        x = todo.pop()
        if id(x) in visited:
            continue
        visited[id(x)] = x
        num_elements += x.numel() if isinstance(x, Tensor) else 0
        num_elements += x.size if isinstance(x, np.ndarray) else 0
        if isinstance(x, Tensor | np.ndarray) and num_elements > _MAX_ELEMENTS:
            continue
        restore = _record_object(x)
        if restore is not None:
            restores.append(restore)
        todo += [inner for inner in _iterate_inside(x) if type(inner) not in _ATOMS]

    def restore_all() -> None:
        for restore in restores:
            restore()

    return restore_all


def _record_object(x: Any) -> Restore | None:
    """Return a function that restores one object; None: it cannot change, or is not ours."""
    if isinstance(x, Tensor):
        return _record_tensor(x)
    if type(x) in (dict, OrderedDict, defaultdict, Counter):
        return partial(_restore_dict, x, dict(x))
    if type(x) in (list, deque, set):
        return partial(_restore_items, x, list(x))
    if isinstance(x, CellType):
        return partial(setattr, x, "cell_contents", x.cell_contents)
    if isinstance(x, type) and _is_users(x):
        return partial(_restore_class, x, _select_variables(vars(x)))
    if isinstance(x, np.ndarray) and x.flags.writeable:
        return partial(np.copyto, x, x.copy())
    if isinstance(x, torch.Generator):
        return _discard_result(x.set_state, x.get_state())
    if isinstance(x, random.Random):
        return partial(x.setstate, x.getstate())
    if isinstance(x, np.random.Generator):
        return partial(setattr, x.bit_generator, "state", x.bit_generator.state)
    if isinstance(x, FunctionType) and _is_users(x):
        return partial(_restore_dict, x.__globals__, _select_globals(x), is_whole=False)
    return None


def _discard_result(function: Callable[..., object], *args: Any) -> Restore:
    def call() -> None:
        function(*args)

    return call


def _iterate_inside(x: Any) -> Iterator[Any]:
    """Yield the objects that an object leads to."""
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
        yield from _select_globals(x).values() if _is_users(x) else ()
    elif isinstance(x, type):
        yield from (*_select_variables(vars(x)).values(), *x.__bases__) if _is_users(x) else ()
    elif isinstance(x, nn.Module) or _is_users(x):
        yield from (getattr(x, "__dict__", None), type(x))


def _is_users(x: Any) -> bool:
    """Return whether an object belongs to the user and not to a package of this file's list."""
    home = x.__module__ if isinstance(x, FunctionType | type) else type(x).__module__
    return isinstance(home, str) and home.partition(".")[0] not in _FOREIGN


def _select_globals(function: FunctionType) -> dict[str, Any]:
    """Return the global variables that a function names."""
    names = function.__code__.co_names
    return _select_variables({name: function.__globals__.get(name) for name in names})


def _select_variables(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that are no functions, classes or modules, by name."""
    kinds = (int, float, Tensor, np.ndarray, dict, list, deque, set)
    return {
        name: x
        for name, x in objects.items()
        if isinstance(x, kinds) or (_is_users(x) and hasattr(x, "__dict__") and not callable(x))
    }


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not set yet
        return False


def _restore_class(x: type, before: Mapping[str, Any]) -> None:
    for name, value in before.items():
        if vars(x).get(name, x) is not value:
            setattr(x, name, value)


def _restore_dict(x: dict[Any, Any], before: dict[Any, Any], *, is_whole: bool = True) -> None:
    if is_whole:
        for key in [key for key in x if key not in before]:
            del x[key]
    for key, value in before.items():
        if x.get(key, x) is not value:
            x[key] = value


def _restore_items(x: Any, before: list[Any]) -> None:
    if len(x) == len(before) and all(a is b for a, b in zip(x, before, strict=True)):
        return
    x.clear()
    (x.update if isinstance(x, set) else x.extend)(before)


def _record_tensor(x: Tensor) -> Restore | None:
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
