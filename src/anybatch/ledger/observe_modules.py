"""Calls of a model and its modules in the user's own loop, and the plan of each call.

The losses are not known at a call. To find placements, the module is called again with a few
examples, and numbers v_i made of each example's outputs replace the losses:

    v_i = sum_k cos(k) y_ik,      y_i the outputs of example i

Outputs in which examples act on each other, such as the logits [B, B] of a contrastive model, are
left out, if the others show that the model keeps its examples apart.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from anybatch._torch import tree_leaves, tree_map
from anybatch.errors import LedgerError
from anybatch.ledger.calibration import NUM_PROBED, find_plan
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.observe_micro_batches import count_rows
from anybatch.pytree import Shared
from anybatch.randomness import preserve_generators, seed_generators

__all__ = [
    "ModuleCall",
    "ModuleHooks",
    "list_tensors",
    "locate_examples",
    "make_weights",
    "plan_call",
]

_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError)


class ModuleHooks:
    """Hooks that see the outermost calls of a model and its modules.

    Args:
        before: called with the module, its args and kwargs.
        after: called with the module and its output, or None if it raised an error.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[nn.Module, Any, Any], None],
        after: Callable[[nn.Module, Any], None],
    ) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        """Name of each module, "" for the model."""
        self.is_paused = False
        """True while the library itself calls the modules."""
        self._stack: list[nn.Module] = []
        self._before, self._after = before, after

    @property
    def is_inside(self) -> bool:
        """True if a module is running."""
        return bool(self._stack)

    @contextmanager
    def register(self) -> Iterator[None]:
        """Register the hooks within the context."""
        handles = []
        for module in self.names:
            if hasattr(module, "_c"):  # scripted modules have no hooks
                continue
            handles += [
                module.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.is_paused or module not in self.names:  # a copy of the model has the hooks too
            return None
        self._stack.append(module)
        if len(self._stack) > 1:
            return None
        self._before(module, args, kwargs)
        has_shared = any(isinstance(leaf, Shared) for leaf in tree_leaves((args, kwargs)))
        return tree_map(_unwrap_shared, (args, kwargs)) if has_shared else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.is_paused or not self._stack or self._stack[-1] is not module:
            return
        self._stack.pop()
        if not self._stack:
            self._after(module, output)


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A call of a module with B examples along a dimension of its inputs."""

    module: nn.Module
    args: Any
    kwargs: Any
    size: int
    dim: int

    def cut(self, few: int) -> "ModuleCall":
        """Return the call with its first examples alone, and whole arguments for all of them."""

        def cut_leaf(leaf: Any) -> Any:
            if isinstance(leaf, Shared):
                return leaf
            if not isinstance(leaf, Tensor):
                return copy.deepcopy(leaf)  # the module can change it, for instance a cache
            is_cut = few < self.size and count_rows(leaf, self.dim) == self.size
            part = leaf.detach().narrow(self.dim, 0, few) if is_cut else leaf.detach()
            return part.clone().requires_grad_(leaf.requires_grad)

        args, kwargs = tree_map(cut_leaf, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, size=few)

    def run(self, context: AbstractContextManager[object]) -> list[Tensor]:
        """Call the module within a context, always with the same random numbers."""
        call = self.cut(self.size)  # a copy, since the module can write into its inputs
        args, kwargs = tree_map(_unwrap_shared, (call.args, call.kwargs))
        tensors = list_tensors((args, kwargs))
        device = tensors[0].device if tensors else torch.device("cpu")
        with preserve_generators(device), torch.enable_grad():
            seed_generators(0, device)
            with context:
                return list_tensors(self.module(*args, **kwargs))


def _unwrap_shared(leaf: Any) -> Any:
    return leaf.leaf if isinstance(leaf, Shared) else leaf


def list_tensors(tree: Any) -> list[Tensor]:
    """List the tensors of a nested structure, without `Shared` ones."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def locate_examples(shape: tuple[int, ...], size: int, dim: int) -> tuple[int, int] | None:
    """Locate B examples in an output: return a dimension, and the number of rows per example."""
    ndim = len(shape)
    if -ndim <= dim < ndim and shape[dim] == size:
        return dim % ndim, 1
    for k, length in enumerate(shape):
        if length == size:
            return k, 1
    if ndim and shape[0] and shape[0] % size == 0:
        return 0, shape[0] // size
    return None


def make_weights(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Make weights cos(k) of a shape. No sum cancels, as that of a softmax would with ones."""
    k = torch.arange(torch.Size(shape).numel(), device=like.device)
    return torch.cos(k).to(like.dtype).reshape(shape)


def plan_call(
    call: ModuleCall, mode: tuple[int, ...], parameters: Mapping[str, nn.Parameter]
) -> tuple[Plan, set[int] | None]:
    """Find where the examples lie when a module is called.

    Returns:
        The plan, and the numbers of the outputs that have rows per example, or None if these are
        unknown. If the module cannot be called again, the plan is empty, and its placements must be
        confirmed at the step.
    """
    sizes = {count_rows(t, call.dim) for t in list_tensors((call.args, call.kwargs))}
    few = call.cut(min(NUM_PROBED, call.size)) if call.size in sizes else call
    for attempt in (few, call):  # an argument for all examples can be as long as the batch
        try:
            # Saved tensors stay as they are: hooks would make checkpointing repeat the call.
            with saved_tensors_hooks(lambda x: x, lambda x: x):
                return _plan_attempt(attempt, mode, parameters)
        except LedgerError:
            raise
        except _FAILURES:
            continue
    return Plan(), None


def _plan_attempt(
    call: ModuleCall, mode: tuple[int, ...], parameters: Mapping[str, nn.Parameter]
) -> tuple[Plan, set[int] | None]:
    find = partial(find_plan, call.module, mode, parameters)
    outputs = _Outputs(call, None)
    try:
        return find(outputs.compute_values, None), outputs.numbers
    except LedgerError:
        separate = _find_separate_outputs(call)
        if not separate:
            raise
    outputs = _Outputs(call, separate)
    return find(outputs.compute_values, None), outputs.numbers


class _Outputs:
    """Outputs of a call that have rows per example.

    Args:
        call: the call.
        allowed: numbers of the outputs to use; None: all.
    """

    def __init__(self, call: ModuleCall, allowed: set[int] | None) -> None:
        self._call, self._allowed = call, allowed
        self.numbers: set[int] | None = None
        """Numbers of the outputs with rows; None: the module has not been called."""

    def compute_values(self, context: AbstractContextManager[object]) -> Tensor:
        """Call the module; return v [B]."""
        call, outputs = self._call, self._call.run(context)
        by_number = {number: x for number, x in enumerate(outputs) if _has_rows(x, call)}
        numbers = {*by_number} if self._allowed is None else {*by_number} & self._allowed
        self.numbers = numbers
        if not numbers:
            shapes = ", ".join(str(tuple(t.shape)) for t in outputs) or "no tensors"
            raise LedgerError(
                f"A module was called with {call.size} examples and gave outputs of shapes "
                f"{shapes}. The ledger needs an output with a row for each example. Return the "
                f"outputs, or one loss per example, from the module; or say how many examples "
                f"there are and along which dimension: ab.observe(model, examples=B, dim=1)."
            )
        rows = [_flatten_examples(by_number[number], call) for number in numbers]
        wide = max((x.dtype for x in rows), key=lambda dtype: dtype.itemsize)
        return torch.stack([(x @ make_weights(x.shape[1:], x)).to(wide) for x in rows]).sum(0)


def _has_rows(x: Tensor, call: ModuleCall) -> bool:
    is_number = x.is_floating_point() or x.is_complex()
    return is_number and locate_examples(tuple(x.shape), call.size, call.dim) is not None


def _flatten_examples(x: Tensor, call: ModuleCall) -> Tensor:
    """Reshape an output to [B, k]."""
    k, each = locate_examples(tuple(x.shape), call.size, call.dim) or (0, 1)
    rows = x.unflatten(k, (call.size, each)).movedim(k, 0)  # type: ignore[no-untyped-call]
    return (torch.view_as_real(rows) if x.is_complex() else rows).reshape(call.size, -1)


def _find_separate_outputs(call: ModuleCall) -> set[int]:
    """Find the outputs that half of the examples have alone, unless all are."""
    size = (call.size + 1) // 2
    try:
        whole, half = (c.run(torch.no_grad()) for c in (call, call.cut(size)))
    except _FAILURES:
        return set()
    half_call = replace(call, size=size)
    pairs = [
        (number, _flatten_examples(x, call)[:size], _flatten_examples(y, half_call))
        for number, (x, y) in enumerate(zip(whole, half, strict=False))
        if _has_rows(x, call) and _has_rows(y, half_call)
    ]
    separate = {
        number
        for number, x, y in pairs
        if x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-5)
    }
    return separate if len(separate) < len(pairs) else set()
