"""Form of autograd's graph, and the uses of parameters in it.

    y = a W^T + b    leaves    AddmmBackward0 -> AccumulateGrad of b
                                              -> the graph of a
                                              -> TBackward0 -> AccumulateGrad of W

Every gradient of a parameter goes through an edge to its `AccumulateGrad`. So a graph in which each
of these edges has a rule shows all uses, whatever the code that made it. If all other operations
keep to their rows, row i of each product belongs to example i. There are rules for products with
one row for each example. Other uses need more than the graph shows, or cost less if the ledger
computes the gradient of the parameter too.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from anybatch.ledger.contractions.base import Contraction, PerExample, square_norms
from anybatch.ledger.contractions.linear import Product
from anybatch.ledger.unplaced import UnplacedError

__all__ = ["GraphForm", "find_uses", "list_nodes", "make_uses"]

MakeUse = Callable[[Any, Tensor, Tensor], Contraction]
"""Make a use from the node, the gradient d [B, p] of its output, and |d_i|^2."""


class GraphForm(NamedTuple):
    """Form of the graph of one pass, and where parameters are used in it."""

    shape: list[object]  # of `list_nodes`
    uses: dict[int, list[tuple[str, MakeUse]]]  # by the place of the node in `list_nodes`
    counts: dict[str, int]  # number of uses of each parameter


def list_nodes(value: Tensor, names: Mapping[int, str]) -> tuple[list[Any], list[object]]:
    """List the nodes of the graph of a tensor.

    Args:
        names: of the parameters, by id.

    Returns:
        The nodes, and the shape of the graph. Two graphs of one shape have the same operations,
        edges and parameters, in the same order.
    """
    places: dict[Any, int] = {None: -1}
    shape: list[object] = []
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        place = places.get(node)
        if place is not None:
            shape.append(place)
            continue
        places[node] = len(places) - 1
        shape.append(type(node))
        following = node.next_functions  # type: ignore[union-attr]
        if following:
            waiting += [child for child, _ in following]
        else:
            shape.append(names.get(id(getattr(node, "variable", None))))
    del places[None]
    return list(places), shape


def find_uses(
    nodes: Sequence[Any], names: Mapping[int, str], size: int
) -> dict[int, list[tuple[str, MakeUse]]] | None:
    """Find all uses of parameters in a graph.

    Returns:
        None: some use has no rule, or an operation may move something from row to row.
    """
    uses: dict[int, list[tuple[str, MakeUse]]] = {}
    for place, node in enumerate(nodes):
        if _is_leaf(node) or _get_parameter(node, names) is not None:
            continue
        if any(shape[:1] != (size,) for shape in _list_shapes(node)):
            return None
        is_product = False
        for slot, (child, _) in enumerate(node.next_functions):
            name = _get_parameter(child, names)
            if name is None:
                continue
            make = _RULES.get((_name_kind(node), slot, _name_kind(child)))
            if make is None or (_name_kind(node) == "AddmmBackward0" and not _is_plain_sum(node)):
                return None
            is_product = True
            uses.setdefault(place, []).append((name, make))
        if not (is_product or _keeps_rows(node)):
            return None
    return uses


def _keeps_rows(node: Any) -> bool:
    """Return whether row i of an operation's output depends on row i of its operands alone.

    All of these have as many rows.
    """
    if not _ROWWISE.fullmatch(_name_kind(node)):
        return False
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    ndims = {len(_list_shapes(child)[k]) for child, k in edges if not _is_leaf(child)}
    dims = getattr(node, "_saved_dim", None)
    if dims is None:
        return len(ndims) <= 1  # broadcasting could align a column with the rows
    dims = dims if isinstance(dims, tuple) else (dims,)
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims]  # torch stores -1 as 2^64 - 1
    return all(dim % ndim for dim in signed for ndim in ndims)


def _list_shapes(node: Any) -> list[tuple[int, ...]]:
    """List the shapes of a node's outputs."""
    return [tuple(output.shape) for output in node._input_metadata]


def _get_parameter(node: Any, names: Mapping[int, str]) -> str | None:
    """Return the name of the parameter that a node leads to, itself or by a transpose."""
    if _is_transpose(node):
        node = node.next_functions[0][0]
    return names.get(id(getattr(node, "variable", None)))


def _is_leaf(node: Any) -> bool:
    return not node.next_functions


def _name_kind(node: Any) -> str:
    return type(node).__name__


def _is_transpose(node: Any) -> bool:
    """Return whether a node is that of `x.t()`, or of `x.T` for a matrix."""
    kind = _name_kind(node)
    return kind == "TBackward0" or (kind == "PermuteBackward0" and node._saved_dims == (1, 0))


def _is_plain_sum(node: Any) -> bool:
    """Return whether `addmm` adds a bias for all rows and a product, both as they are."""
    bias = getattr(node.next_functions[0][0], "variable", None)
    is_bias = bias is not None and bias.ndim == 1
    return bool(is_bias and node._saved_alpha == 1 and node._saved_beta == 1)


def make_uses(
    node: Any, makes: Sequence[tuple[str, MakeUse]], d: Tensor, size: int
) -> Iterator[tuple[str, Contraction]]:
    """Make the uses of parameters in a node, by name, from the gradient d of its output.

    Raises:
        UnplacedError: d has more or fewer rows than examples, such as those of longer sequences.
    """
    if d.shape[0] != size:
        raise UnplacedError(f"A product has {d.shape[0]} rows for {size} examples.", True)
    squares = square_norms(d)  # of the bias, and a factor of those of the matrix
    for name, make in makes:
        yield name, make(node, d, squares)


def _make_product(
    node: Any, d: Tensor, squares: Tensor, *, saved: str, is_transposed: bool
) -> Product:
    a: Tensor = getattr(node, saved)
    return Product(a.detach()[:, None], d[:, None], is_transposed, squares)


def _make_bias(node: Any, d: Tensor, squares: Tensor) -> PerExample:
    return PerExample(d, squares)


_ROWWISE = re.compile(
    r"("
    # one number at a time
    r"Abs|Add|Alias|Clamp|Clone|Cos|Div|Elu|Exp|Gelu|Hardsigmoid|Hardswish|Hardtanh|LeakyRelu|Log|"
    r"LogSigmoid|Mish|Mul|Neg|Pow|Relu|Rsqrt|Sigmoid|Silu|Sin|Softplus|Sqrt|Sub|Tanh|ToCopy|Where|"
    r"BinaryCrossEntropy|BinaryCrossEntropyWithLogits|HuberLoss|MseLoss|SmoothL1Loss|"
    # along a dimension, which must not be the first
    r"Amax|Cat|Gather|Glu|LinalgVectorNorm|LogSoftmax|Logsumexp|Max|Mean|Min|Select|Slice|Softmax|"
    r"Split|Squeeze|Sum|Unsqueeze|"
    # a row at a time, if the number of rows stays
    r"NllLoss|ReshapeAlias|UnsafeView|View"
    r")Backward\d"  # a Function of the user's has no number
)
_RULES: dict[tuple[str, int, str], MakeUse] = {("AddmmBackward0", 0, "AccumulateGrad"): _make_bias}
for _kind, _slot, _saved in (
    ("AddmmBackward0", 2, "_saved_mat1"),
    ("MmBackward0", 1, "_saved_self"),
):
    for _child, _is_transposed in (
        ("TBackward0", False),
        ("PermuteBackward0", False),
        ("AccumulateGrad", True),
    ):
        _RULES[_kind, _slot, _child] = partial(
            _make_product, saved=_saved, is_transposed=_is_transposed
        )
