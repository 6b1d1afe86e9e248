"""An operation without a rule, mapped over the examples, each with a copy of the parameters.

y_i = f(x_i, P_i),    P_i = p;      g_i = dL/dP_i
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anybatch._torch import tree_flatten, tree_map, tree_unflatten
from anybatch.ledger.placement import Placement

__all__ = ["carriers", "mapped", "slow_is_fine"]


def carriers(tensors: list[Tensor], placement: Placement, size: int) -> tuple[bool, ...]:
    """Which of some operands have examples there, as far as their shapes tell."""
    k = placement.dim
    return tuple(t.ndim > k and t.shape[k] == size for t in tensors)


def mapped(
    call: tuple[Callable[..., Any], Any, Any],
    copies: Mapping[int, Tensor],
    carried: Mapping[int, Tensor],
    placement: Placement,
    num_examples: int,
) -> Any:
    """The result of a call, with each example apart from the others.

    Args:
        call: function, args and kwargs.
        copies: [B, ...] of parameters, by their id.
        carried: operands with examples, by their id.
        placement: of the examples in those, and in the result.

    Raises:
        ValueError: a result that has its examples elsewhere; what torch raises where the operation
            does not allow it.
    """
    func, *arguments = call
    leaves, spec = tree_flatten(tuple(arguments))
    where = [i for i, leaf in enumerate(leaves) if id(leaf) in copies or id(leaf) in carried]
    inputs = [
        copies[id(leaf)] if id(leaf) in copies else placement.first(leaf, num_examples)
        for leaf in (leaves[i] for i in where)
    ]
    is_dim, k = placement.kind == "dim", placement.dim
    length = 1 if is_dim else next(iter(carried.values())).shape[k] // num_examples

    def narrowed(out: Any) -> Any:
        if not isinstance(out, Tensor) or out.ndim <= k or out.shape[k] != length:
            raise ValueError("the result has its examples elsewhere")
        return out.squeeze(k) if is_dim else out

    def one(*values: Tensor) -> Any:
        own = list(leaves)
        for i, value in zip(where, values, strict=True):
            is_widened = is_dim and id(leaves[i]) in carried
            own[i] = value.unsqueeze(k) if is_widened else value
        own_args, own_kwargs = tree_unflatten(own, spec)
        return tree_map(narrowed, func(*own_args, **own_kwargs))

    with slow_is_fine():
        result = torch.vmap(one)(*inputs)
    return tree_map(placement.back, result)


@contextmanager
def slow_is_fine() -> Iterator[None]:
    """Without the warning that an operation is mapped in a loop: the result is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
