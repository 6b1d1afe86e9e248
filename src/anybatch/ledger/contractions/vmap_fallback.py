"""Operations without a rule: `torch.vmap` runs them per example, each with its copy of a parameter.

y_i = f(x_i, P_i),    P_i = p,      g_i = dL/dP_i
"""

from typing import Any

import torch
from torch import Tensor

from anybatch._torch import tree_flatten, tree_map, tree_unflatten
from anybatch.ledger.contractions.calls import Call, Context
from anybatch.ledger.contractions.derived import ignore_vmap_warning
from anybatch.ledger.contractions.placement import Placement

__all__ = ["run_mapped"]


def run_mapped(call: Call, context: Context) -> Any:
    """Run a call per example, and try the next placement where torch refuses one."""
    if context.num_examples == 1:
        return context.run_single(call)
    plan, largest = context.plan, max(call.data, key=lambda t: t.ndim)
    while True:
        placement = context.place(call, tuple(largest.shape), largest.ndim)
        if placement is None:
            return context.run_shared(call)
        length = largest.shape[placement.dim]
        flags = tuple(
            t.ndim > placement.dim and t.shape[placement.dim] == length for t in call.data
        )
        flags = plan.operand_flags.setdefault(call.site, flags)
        batched = {id(t): t for t, flag in zip(call.data, flags, strict=True) if flag}
        copies = {
            id(p): context.copy_parameter(p, call.sites[id(p)], placement) for p in call.parameters
        }
        try:
            return _map(call, copies, batched, placement, context.num_examples)
        except (RuntimeError, ValueError, IndexError, TypeError):
            plan.reject(call.site, placement)


def _map(
    call: Call,
    copies: dict[int, Tensor],
    batched: dict[int, Tensor],
    placement: Placement,
    num_examples: int,
) -> Any:
    """Run a call for each example alone.

    Args:
        call: the call.
        copies: [B, ...] of the parameters, by their id.
        batched: operands that contain the examples, by their id.
        placement: of the examples in these operands and in the result.
        num_examples: B.

    Raises:
        ValueError: the result has its examples elsewhere; or any error of an operation that torch
            cannot map.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    indices = [i for i, leaf in enumerate(leaves) if id(leaf) in copies or id(leaf) in batched]
    inputs = [
        copies[id(leaf)] if id(leaf) in copies else placement.move_first(leaf, num_examples)
        for leaf in (leaves[i] for i in indices)
    ]
    is_dim, k = placement.kind == "dim", placement.dim
    length = 1 if is_dim else next(iter(batched.values())).shape[k] // num_examples

    def squeeze(output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim <= k or output.shape[k] != length:
            raise ValueError("the result has its examples elsewhere")
        return output.squeeze(k) if is_dim else output

    def run_one(*values: Tensor) -> Any:
        inner = list(leaves)
        for i, value in zip(indices, values, strict=True):
            # The operation sees a batch of one example, so that its dimensions keep their numbers.
            has_batch = is_dim and id(leaves[i]) in batched
            inner[i] = value.unsqueeze(k) if has_batch else value
        args, kwargs = tree_unflatten(inner, spec)
        return tree_map(squeeze, call.func(*args, **kwargs))

    with ignore_vmap_warning():
        result = torch.vmap(run_one)(*inputs)
    return tree_map(placement.move_back, result)
