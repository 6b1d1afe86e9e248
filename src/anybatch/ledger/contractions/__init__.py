"""Rules for the operations in which the batch meets a parameter, one rule a file."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from anybatch._torch import grouped_mm as torch_grouped_mm
from anybatch.ledger.contractions import norms
from anybatch.ledger.contractions.base import Rule
from anybatch.ledger.contractions.convolution import convolve, convolve_transposed
from anybatch.ledger.contractions.embedding import embedding, index_rows, index_select
from anybatch.ledger.contractions.grouped import multiply_groups
from anybatch.ledger.contractions.linear import addmm, linear, matmul
from anybatch.ledger.contractions.recurrent_cells import state_linear, state_linear_rule

__all__ = ["CASTS", "ELEMENTWISE", "EXPANSIONS", "JOINS", "RULES"]

RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    state_linear: state_linear_rule,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.mm: matmul,
    F.embedding: embedding,
    torch.Tensor.__getitem__: index_rows,
    torch.index_select: index_select,
    torch.Tensor.index_select: index_select,
    torch_grouped_mm: multiply_groups,
    torch.conv1d: convolve,
    torch.conv2d: convolve,
    torch.conv3d: convolve,
    torch.conv_transpose1d: convolve_transposed,
    torch.conv_transpose2d: convolve_transposed,
    torch.conv_transpose3d: convolve_transposed,
    torch.layer_norm: norms.layer_norm,
    torch.rms_norm: norms.rms_norm,
    torch.group_norm: norms.group_norm,
    torch.instance_norm: norms.instance_norm,
    torch.batch_norm: norms.batch_norm,
    torch.prelu: norms.prelu,
}
"""Operations with a rule of their own."""


def _find_functions(names: str) -> set[Callable[..., Any]]:
    """Find functions of torch and methods of tensors by name."""
    homes = (torch, torch.Tensor)
    functions = (getattr(home, name, None) for home in homes for name in names.split())
    return {function for function in functions if function is not None}


ELEMENTWISE = _find_functions(
    "add sub rsub mul div true_divide pow maximum minimum fmax fmin where lerp addcmul addcdiv"
    " atan2 hypot logaddexp xlogy clamp clip broadcast_tensors"
    " __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__"
    " add_ sub_ mul_ div_ pow_ lerp_ addcmul_ addcdiv_ copy_ __iadd__ __isub__ __imul__"
    " __itruediv__ __ipow__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__"
)
"""Operations that broadcast their operands and work element by element."""

EXPANSIONS = _find_functions("broadcast_to expand expand_as repeat repeat_interleave tile")
"""Operations that repeat their first operand."""

JOINS = _find_functions("cat concat concatenate stack hstack vstack dstack")
"""Operations that concatenate or stack their operands."""

CASTS = _find_functions("to type_as reshape_as view_as")
"""Operations that convert their first operand to the form of another."""
