"""The plan of one call in a loop of one's own: the module is called again, with a few examples.

Losses are not known there. In their place stand numbers v_i made of each example's own outputs:

    v_i = sum_k cos(k) y_ik,      y_i the outputs of example i

Outputs in which examples act on each other, such as the logits [B, B] of a contrastive model, are
left out, if the others show that the model keeps its examples apart.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from anybatch.errors import LedgerError
from anybatch.ledger.placement import Plan
from anybatch.ledger.plans import NUM_PROBED, plan_of
from anybatch.pytree import Shared
from anybatch.randomness import preserve_generators, seed_generators

__all__ = ["Call", "count_rows", "place_rows", "plan_call", "spread", "tensors_of", "unwrap"]

_CPU = torch.device("cpu")
_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module with B examples along a dimension of its inputs."""

    module: nn.Module
    args: Any
    kwargs: Any
    size: int
    dim: int

    def cut(self, few: int) -> "Call":
        """The same call with its first examples alone; what belongs to all of them stays whole."""

        def take(leaf: Any) -> Any:
            if isinstance(leaf, Shared):
                return leaf
            if not isinstance(leaf, Tensor):
                return copy.deepcopy(leaf)  # the module may change it, as a cache
            is_cut = few < self.size and count_rows(leaf, self.dim) == self.size
            own = leaf.detach().narrow(self.dim, 0, few) if is_cut else leaf.detach()
            return own.clone().requires_grad_(leaf.requires_grad)

        args, kwargs = tree_map(take, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, size=few)

    def outputs(self, context: AbstractContextManager[object]) -> list[Tensor]:
        """Call the module, always with the same random numbers; its tensors."""
        own = self.cut(self.size)  # it may write into its inputs
        args, kwargs = tree_map(unwrap, (own.args, own.kwargs))
        device = next((t.device for t in tensors_of((args, kwargs))), _CPU)
        with preserve_generators(device), torch.enable_grad():
            seed_generators(0, device)
            with context:
                return tensors_of(self.module(*args, **kwargs))


def unwrap(leaf: Any) -> Any:
    """An argument as the module gets it."""
    return leaf.leaf if isinstance(leaf, Shared) else leaf


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of any nesting, but those that belong to all examples."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def count_rows(tensor: Tensor, dim: int) -> int | None:
    """The size of a tensor along the dimension of examples; None: it has no such dimension."""
    return tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else None


def place_rows(shape: tuple[int, ...], size: int, dim: int) -> tuple[int, int] | None:
    """Where B examples lie in an output: a dimension, and how many rows of it each has."""
    ndim = len(shape)
    if -ndim <= dim < ndim and shape[dim] == size:
        return dim % ndim, 1
    for k, length in enumerate(shape):
        if length == size:
            return k, 1
    if ndim and shape[0] and shape[0] % size == 0:
        return 0, shape[0] // size
    return None


def spread(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Weights of a shape that let no sum cancel, as that of a softmax would."""
    k = torch.arange(torch.Size(shape).numel(), device=like.device)
    return torch.cos(k).to(like.dtype).reshape(shape)


def plan_call(
    call: Call, mode: tuple[int, ...], parameters: Mapping[str, nn.Parameter]
) -> tuple[Plan, set[int] | None]:
    """Find where examples lie when a module is called.

    Returns:
        The plan, and which of the outputs have a row for each example, apart from the others;
        None: it was not looked at. A plan that knows nothing if the module cannot be called again:
        placements are then to be confirmed.

    Raises:
        LedgerError: examples that cannot be told apart.
    """
    rows = {count_rows(t, call.dim) for t in tensors_of((call.args, call.kwargs))}
    few = call.cut(min(NUM_PROBED, call.size)) if call.size in rows else call
    for attempt in (few, call):  # an argument for all examples may be as long as the batch
        try:
            with saved_tensors_hooks(_itself, _itself):  # checkpointing would repeat the call
                return _plan(attempt, mode, parameters)
        except LedgerError:
            raise
        except _FAILURES:
            continue
    return Plan(), None


def _plan(
    call: Call, mode: tuple[int, ...], parameters: Mapping[str, nn.Parameter]
) -> tuple[Plan, set[int] | None]:
    plan, rows = partial(plan_of, call.module, mode, parameters), _Rows(call, None)
    try:
        return plan(rows.values, None), rows.used
    except LedgerError:
        apart = _find_apart(call)
        if not apart:
            raise
    rows = _Rows(call, apart)
    return plan(rows.values, None), rows.used


class _Rows:
    """The rows of a call's outputs.

    Args:
        call: the call.
        allowed: the numbers of the outputs that are looked at; None: of all.
    """

    def __init__(self, call: Call, allowed: set[int] | None) -> None:
        self._call, self._allowed = call, allowed
        self.used: set[int] | None = None
        """Numbers of the outputs that have rows; None: the module was not called."""

    def values(self, context: AbstractContextManager[object]) -> Tensor:
        """Call the module; v [B]."""
        call, outputs = self._call, self._call.outputs(context)
        rows = {number: x for number, x in enumerate(outputs) if _has_rows(x, call)}
        self.used = {*rows} if self._allowed is None else {*rows} & self._allowed
        if not self.used:
            shapes = ", ".join(str(tuple(t.shape)) for t in outputs) or "no tensors"
            raise LedgerError(
                f"a module was called with {call.size} examples and gave outputs of shapes "
                f"{shapes}. The ledger needs an output with a row for each example. Return the "
                f"outputs, or one loss per example, from the module; or say how many examples "
                f"there are and along which dimension: ab.observe(model, examples=B, dim=1)."
            )
        found = [_by_example(rows[number], call) for number in self.used]
        wide = max((x.dtype for x in found), key=lambda dtype: dtype.itemsize)
        return torch.stack([(x @ spread(x.shape[1:], x)).to(wide) for x in found]).sum(0)


def _has_rows(x: Tensor, call: Call) -> bool:
    is_real = x.is_floating_point() or x.is_complex()
    return is_real and place_rows(tuple(x.shape), call.size, call.dim) is not None


def _by_example(x: Tensor, call: Call) -> Tensor:
    """[B, k] of an output."""
    k, each = place_rows(tuple(x.shape), call.size, call.dim) or (0, 1)
    rows = x.unflatten(k, (call.size, each)).movedim(k, 0)  # type: ignore[no-untyped-call]
    return (torch.view_as_real(rows) if x.is_complex() else rows).reshape(call.size, -1)


def _find_apart(call: Call) -> set[int]:
    """Which outputs, but not all of them, are those that half of the examples have alone."""
    half = (call.size + 1) // 2
    try:
        whole, part = (c.outputs(torch.no_grad()) for c in (call, call.cut(half)))
    except _FAILURES:
        return set()
    pairs = [
        (number, _by_example(x, call)[:half], _by_example(y, replace(call, size=half)))
        for number, (x, y) in enumerate(zip(whole, part, strict=False))
        if _has_rows(x, call) and _has_rows(y, replace(call, size=half))
    ]
    found = {
        number
        for number, x, y in pairs
        if x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-5)
    }
    return found if len(found) < len(pairs) else set()


def _itself(tensor: Tensor) -> Tensor:
    return tensor
