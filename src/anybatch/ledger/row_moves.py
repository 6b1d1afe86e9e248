"""Calls of torch that can put rows of one example in the place of another's.

    rows along dimension k can be those of examples    if  B divides its size

Sorting, packing and routing move rows depending on their content. In the first batches the rows can
lie in order by chance. A step with such a call is confirmed again (`watched_pass`), which costs
time. So this module passes calls that cannot move examples: indices that leave every row in its
place, look-ups in parameters and buffers, a dimension after that of the examples.

Arithmetic can move rows too. This module detects products with a square matrix of examples. Other
arithmetic that begins to move rows later is detected by the confirmation of every 32nd step.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

__all__ = ["RowMoves"]


class _Axis(NamedTuple):
    """A dimension along which a call can move rows."""

    shape: tuple[int, ...]
    dim: int
    tensor: Tensor | None = None  # source or destination of the rows
    index: Any = None  # selects the rows
    least: int = 1  # number of dimensions that must have the size of the batch


FindAxes = Callable[..., Iterable[_Axis]]
"""List the dimensions along which a call moves rows, from (args, kwargs)."""


@final
class RowMoves:
    """Detector of calls that can move rows of examples, for one model.

    Args:
        constants: tensors that are the same in every batch, such as buffers.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        self._constants = {id(x): x for x in constants}  # references keep the ids valid
        self._other_axes: set[tuple[str, int, int, int]] = set()
        """Dimensions after the first, by function, that cannot be those of the examples: some batch
        size does not divide their size."""

    def may_move(self, func: Any, args: Any, kwargs: Any, num_examples: int) -> bool:
        """Return whether a call can move rows of B examples."""
        name = getattr(func, "__name__", "")
        find_axes = _get_axes_function(name)
        if find_axes is None or num_examples == 1:
            return False
        return any(
            self._can_hold_examples(name, axis, num_examples)
            and not _is_identity(axis.index, axis.shape[axis.dim])
            for axis in find_axes(args, kwargs or {})
        )

    def _can_hold_examples(self, name: str, axis: _Axis, num_examples: int) -> bool:
        shape, k, tensor, *_, least = axis
        if not -len(shape) <= k < len(shape) or isinstance(tensor, nn.Parameter):
            return False
        k %= len(shape)
        place = (name, len(shape), k, shape[k])
        if shape[k] % num_examples:
            if k:
                self._other_axes.add(place)
            return False
        if place in self._other_axes:
            return False
        if shape[k] == num_examples:
            return shape.count(num_examples) >= least
        is_inner = shape[k] == 0 or num_examples in shape[:k] or least > 1
        return not is_inner and not self._is_constant(tensor)

    def _is_constant(self, tensor: Tensor | None) -> bool:
        if tensor is None:
            return False
        return id(tensor) in self._constants or id(tensor._base) in self._constants


def _get_axes_function(name: str) -> FindAxes | None:
    """Look up the function that finds axes, for a name with or without the underscore of in-place
    operations."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    name = name.partition(".")[0]  # torch.ops has names such as index_select.default
    if name in _FUNCTIONS or name.endswith("__"):
        return _FUNCTIONS.get(name)
    return _FUNCTIONS.get(name.removesuffix("_"))


def _get_argument(args: Any, kwargs: Any, position: int, *names: str) -> Any:
    """Return an argument by its position or name, or None."""
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _along(position: int, default: int | None, *, is_last: bool = False) -> FindAxes:
    """Find the dimensions that the argument at a position names.

    Args:
        position: of the argument; more numbers can follow it if `is_last`.
        default: the dimension without this argument; None: all dimensions.
    """

    def find(args: Any, kwargs: Any) -> Iterator[_Axis]:
        x = _get_argument(args, kwargs, 0, "input", "self")
        if not isinstance(x, Tensor):
            return
        dims = _get_argument(args, kwargs, position, "dim", "dims", "axis")
        dims = default if dims is None else dims
        if isinstance(dims, int):
            dims = [dims, *(k for k in args[position + 1 :] if is_last and isinstance(k, int))]
        for k in range(x.ndim) if dims is None else dims:
            yield _Axis(tuple(x.shape), k, x)

    return find


def _find_selected(args: Any, kwargs: Any) -> Iterator[_Axis]:
    """Find the axis of `index_select(x, dim, index)`."""
    index = _get_argument(args, kwargs, 2, "index")
    for axis in _along(1, None)(args, kwargs):
        yield axis._replace(index=index)


def _is_identity(index: Any, size: int) -> bool:
    """Return whether an index leaves each row in its place."""
    if isinstance(index, list | range):
        return len(index) == size and all(type(i) is int and i == k for k, i in enumerate(index))
    if not isinstance(index, Tensor) or index.numel() != size or index.dtype == torch.bool:
        return False
    return bool((index.flatten() == torch.arange(size, device=index.device)).all())


def _find_indexed(args: Any, kwargs: Any) -> Iterator[_Axis]:
    """Find the axes of `x[index]` that a tensor or a list indexes."""
    x, index = args
    for k, item in _iterate_index(x, index):
        if not isinstance(item, slice | int):
            yield _Axis(tuple(x.shape), k, x, item)


def _find_assigned(args: Any, kwargs: Any) -> Iterator[_Axis]:
    """Find the axes of `x[index] = value`; whole dimensions and single numbers move no rows."""
    x, index, value = args
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    for k, item in _iterate_index(x, index):
        if not (isinstance(item, slice) and item == slice(None)):
            yield _Axis(tuple(x.shape), k, x, item)


def _iterate_index(x: Tensor, index: Any) -> Iterator[tuple[int, Any]]:
    """Yield each dimension with its item of the index; a mask has several dimensions."""
    masks = (torch.bool, torch.uint8)
    items = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    counts = [i.ndim if isinstance(i, Tensor) and i.dtype in masks else 1 for i in items]
    k = 0
    for item, n in zip(items, counts, strict=True):
        if item is Ellipsis:
            k += x.ndim - (sum(counts) - 1)
            continue
        for dim in range(k, k + n):
            yield dim, item
        k += n


def _along_joined(default: int, *, is_new: bool) -> FindAxes:
    """Find the dimension, an old or a new one, along which tensors are joined."""

    def find(args: Any, kwargs: Any) -> Iterator[_Axis]:
        tensors = [x for x in _get_argument(args, kwargs, 0, "tensors") if isinstance(x, Tensor)]
        if len(tensors) < 2:
            return
        k = _get_argument(args, kwargs, 1, "dim", "axis")
        k = default if k is None else k
        largest = max(tensors, key=lambda x: x.ndim)
        shape = list(largest.shape)
        if is_new or not shape:
            shape.insert(k % (len(shape) + 1), len(tensors))
        else:
            k %= len(shape)
            shape[k] = sum(x.shape[k] for x in tensors if x.ndim == len(shape))
        yield _Axis(tuple(shape), k)
        if len(shape) == 1:  # vstack and column_stack make a new dimension of rows
            yield _Axis((len(tensors),), 0)

    return find


def _find_table(args: Any, kwargs: Any) -> Iterator[_Axis]:
    """Find the table of `F.embedding(ids, table)` or `torch.embedding(table, ids)`."""
    for x in (*args[:2], kwargs.get("weight")):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            yield _Axis(tuple(x.shape), 0, x)


def _find_square(args: Any, kwargs: Any) -> Iterator[_Axis]:
    """Find square matrices of examples in a product; they can be permutations."""
    operands = [x for arg in (*args, *kwargs.values()) for x in (arg if _is_list(arg) else [arg])]
    for x in operands:
        if not isinstance(x, Tensor) or x.ndim < 2:
            continue
        shape = tuple(x.shape)
        if x.ndim > 2:
            yield from (_Axis(shape, k, x, least=2) for k in range(1, x.ndim))
        elif shape[0] == shape[1]:
            yield _Axis(shape, 0, x)


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _name(names: str, function: FindAxes) -> dict[str, FindAxes]:
    return dict.fromkeys(names.split(), function)


_NO_ARGUMENT = 99  # a position that no call has
_along_all = _along(_NO_ARGUMENT, None)

_FUNCTIONS: dict[str, FindAxes] = {
    "__getitem__": _find_indexed,
    "__setitem__": _find_assigned,
    "index_select": _find_selected,
    **_name("gather scatter scatter_add scatter_reduce", _along(1, None)),
    **_name("index_add index_copy index_reduce", _along(1, None)),
    **_name("take_along_dim repeat_interleave roll", _along(2, None)),
    "topk": _along(2, -1),
    "sort": _along(1, -1),
    "flip": _along(1, None, is_last=True),
    **_name("flipud msort __reversed__", _along(_NO_ARGUMENT, 0)),
    "fliplr": _along(_NO_ARGUMENT, 1),
    **_name("cat concat concatenate vstack row_stack", _along_joined(0, is_new=False)),
    **_name("hstack column_stack", _along_joined(1, is_new=False)),
    "stack": _along_joined(0, is_new=True),
    "embedding": _find_table,
    **_name("matmul mm bmm mv einsum tensordot linear addmm baddbmm", _find_square),
    **_name("__matmul__ __rmatmul__ _sparse_mm sparse_mm dot inner", _find_square),
    **_name("masked_select masked_scatter take put index index_put unique", _along_all),
    **_name("unique_consecutive rot90", _along_all),
    **_name("_pack_padded_sequence _pad_packed_sequence as_strided", _along_all),
    **_name("tolist numpy __array__ __dlpack__", _along_all),
}
"""Functions that can move rows, by name."""
