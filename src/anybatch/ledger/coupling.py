"""Whether examples of a batch act on each other.

    v(x_1 .. x_B)  =  v(x_1 .. x_b), v(x_(b+1) .. x_B)

where a model keeps them apart: losses stay when the batch is halved. The first module whose own
output changes is the one that is named.
"""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from anybatch._torch import tree_leaves
from anybatch.errors import LedgerError

__all__ = ["refuse_coupled", "same"]

Halves = Callable[[], tuple[Tensor, Tensor]]


def refuse_coupled(model: nn.Module, halves: Halves, eps: float) -> None:
    """See that a model keeps examples apart.

    Args:
        model: for the name of the module.
        halves: values [B] of some examples together, and of the same in two halves.
        eps: of the narrowest type that it computes in.

    Raises:
        LedgerError: they act on each other.
    """
    with warnings.catch_warnings():  # of a way back, which there is none here
        warnings.simplefilter("ignore")
        try:
            found = halves()
        except RuntimeError:  # its forward pass differentiates: what is left is to compare
            return
        if not same(*found, eps):
            _refuse(model, halves, eps)


def _refuse(model: nn.Module, halves: Halves, eps: float) -> NoReturn:
    calls: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules() if name}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output) if module in names else ():
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                calls.append((f"the {type(module).__name__} {names[module]!r}", leaf.detach()))

    # A hook on all modules leaves those of the model as they are, which `halves` puts back.
    handle = register_module_forward_hook(note)
    try:
        halves()
    finally:
        handle.remove()
    third = len(calls) // 3
    rounds = zip(calls[:third], calls[third : 2 * third], calls[2 * third :], strict=False)
    where = "the model's own forward or the loss"
    for (name, whole), (_, one), (_, other) in rounds:
        if not _is_joined(whole, one, other, eps):
            where = name
            break
    raise LedgerError(
        f"the losses of a few examples change when the batch is halved, from {where} on, expected "
        f"those of each example alone: the model couples examples, and no gradient belongs to one "
        f"of them. Use GroupNorm or LayerNorm for BatchNorm, attend over dimensions that examples "
        f"do not share, put a loss across the batch into the reduction, or leave it unobserved."
    )


def _is_joined(whole: Tensor, one: Tensor, other: Tensor, eps: float) -> bool:
    """Whether two tensors behind each other make a third, along any dimension."""
    a, b, c = (list(t.shape) for t in (whole, one, other))
    if a == b == c:
        return same(whole, one, eps)
    fitting = [
        k
        for k in range(len(a))
        if len(a) == len(b) == len(c) and [*a[:k], b[k] + c[k], *a[k + 1 :]] == a
    ]
    return any(same(whole, torch.cat([one, other], k), eps) for k in fitting)


def same(x: Tensor, y: Tensor, eps: float) -> bool:
    """Whether two tensors differ by rounding alone, eps being that of one operation."""
    mean = float(y.nan_to_num(0, 0, 0).abs().mean())
    return torch.allclose(x, y, rtol=eps**0.6, atol=eps**0.6 * mean, equal_nan=True)
