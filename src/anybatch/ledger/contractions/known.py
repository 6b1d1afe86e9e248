"""Products with a matrix whose values are known already: of the states of a recurrent layer.

    b_it = W h_it + b,      g_i = sum_t  d_it h_it^T  (of W),    sum_t d_it  (of b)

d_it = dL/db_it. All h are there once the layer has run, and b has done its part in them. What is
left to say is what W and b have met: a tensor stands for b, whose values nobody reads, so that
gradients come by.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from anybatch.ledger.contractions.linear import met_by_rows
from anybatch.ledger.met import Const, Met

__all__ = ["known", "known_linear"]


def known_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of rows [.., d] without a graph; where it is watched its values are not set."""
    if has_torch_function_variadic(rows, weight):
        found: Tensor = handle_torch_function(known_linear, (rows, weight), rows, weight, bias)
        return found
    return F.linear(rows, weight, bias)


def known(const: Const, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Met | None:
    """`known_linear`; None: gradients go on from its matrix, which is data."""
    own_weight, own_bias = const(weight), None if bias is None else const(bias)
    for p, own in ((weight, own_weight), (bias, own_bias)):
        if own is not None and own is p and own.requires_grad:
            return None
    if own_weight.requires_grad:  # plain autograd is to see its gradients too
        output = F.linear(rows, own_weight, own_bias)
    else:
        output = rows.new_empty(()).expand(*rows.shape[:-1], len(weight)).detach()
    return met_by_rows(output, rows, weight, bias, is_transposed=False)
