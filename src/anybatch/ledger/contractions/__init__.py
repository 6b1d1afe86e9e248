"""Which operation of torch follows which rule: one rule a file, its equation first."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from anybatch._torch import grouped_mm as torch_grouped_mm
from anybatch.ledger.contractions import norms
from anybatch.ledger.contractions.base import Contraction
from anybatch.ledger.contractions.convolution import convolution, transposed_convolution
from anybatch.ledger.contractions.embedding import embedding, index_select, indexed
from anybatch.ledger.contractions.grouped import grouped_mm
from anybatch.ledger.contractions.known import known, known_linear
from anybatch.ledger.contractions.linear import Product, addmm, linear, matmul
from anybatch.ledger.met import Rule

__all__ = ["CASTS", "ELEMENTWISE", "EXPANSIONS", "JOINS", "RULES", "merged"]

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    known_linear: known,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.mm: matmul,
    F.embedding: embedding,
    torch.Tensor.__getitem__: indexed,
    torch.index_select: index_select,
    torch.Tensor.index_select: index_select,
    torch_grouped_mm: grouped_mm,
    torch.conv1d: convolution,
    torch.conv2d: convolution,
    torch.conv3d: convolution,
    torch.conv_transpose1d: transposed_convolution,
    torch.conv_transpose2d: transposed_convolution,
    torch.conv_transpose3d: transposed_convolution,
    torch.layer_norm: norms.layer_norm,
    torch.rms_norm: norms.rms_norm,
    torch.group_norm: norms.group_norm,
    torch.instance_norm: norms.instance_norm,
    torch.batch_norm: norms.batch_norm,
    torch.prelu: norms.prelu,
}
"""Operations with a rule of their own."""


def _named(names: str) -> set[Callable[..., Any]]:
    found = (getattr(home, name, None) for home in (torch, torch.Tensor) for name in names.split())
    return {function for function in found if function is not None}


ELEMENTWISE = _named(
    "add sub rsub mul div true_divide pow maximum minimum fmax fmin where lerp addcmul addcdiv"
    " atan2 hypot logaddexp xlogy clamp clip broadcast_tensors"
    " __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__"
    " add_ sub_ mul_ div_ pow_ lerp_ addcmul_ addcdiv_ copy_ __iadd__ __isub__ __imul__"
    " __itruediv__ __ipow__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__"
)
"""Operations that broadcast their operands against each other, element by element."""

EXPANSIONS = _named("broadcast_to expand expand_as repeat repeat_interleave tile")
"""Operations that repeat their first operand."""

JOINS = _named("cat concat concatenate stack hstack vstack dstack")
"""Operations that put their operands next to each other."""

CASTS = _named("to type_as reshape_as view_as")
"""Operations that give their first operand another form, for which they look at others."""


def merged(uses: list[Contraction]) -> list[Contraction]:
    """The same uses, in as few as can be: those of a matrix by rows are one use by all rows."""
    products: dict[bool, list[Product]] = {}
    others: list[Contraction] = []
    for use in uses:
        if isinstance(use, Product):
            products.setdefault(use.is_transposed, []).append(use)
        else:
            others.append(use)
    joined = [
        same[0]
        if len(same) == 1
        else Product(
            torch.cat([use.a for use in same], 1), torch.cat([use.d for use in same], 1), which
        )
        for which, same in products.items()
    ]
    return [*joined, *others]
