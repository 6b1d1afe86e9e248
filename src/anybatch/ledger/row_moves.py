"""Whether a call of torch may put rows of one example in the place of another's.

    rows along dimension k may be those of examples    if  B divides its size, B examples

Sorting, packing and routing move rows by what they hold: the first batches may lie in order by
chance, and no later batch has to. A step with such a call is confirmed again (`confirmation`),
which costs time, so calls that cannot move examples are let pass: indices that leave every row in
its place, look-ups in parameters and buffers, a dimension behind that of the examples.

Arithmetic can move rows too. Products with a square matrix of examples are seen here; whatever else
begins to do so after the first steps is seen by the confirmation at every 32nd step.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

__all__ = ["Moves"]


class _Moved(NamedTuple):
    """A dimension along which a call may move rows."""

    shape: tuple[int, ...]
    dim: int
    tensor: Tensor | None = None  # that the rows are taken from, or put into
    index: Any = None  # by which they are chosen
    least: int = 1  # how many dimensions must have the size of the batch


Find = Callable[..., Iterable[_Moved]]  # (args, kwargs)
_NONE = 99  # a position that no argument has


@final
class Moves:
    """Tells whether a call may move rows of examples, of one model.

    Args:
        constants: tensors that are the same in every batch, such as buffers.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        self._constants = {id(x): x for x in constants}  # held, so that no id is used twice
        self._fixed: set[tuple[str, int, int, int]] = set()
        """Dimensions behind the first, by function, whose size is no multiple of some batch's."""

    def may_move(self, func: Any, args: Any, kwargs: Any, num_examples: int) -> bool:
        """Whether a call may move rows of B examples."""
        name = getattr(func, "__name__", "")
        find = _find(name)
        if find is None or num_examples == 1:
            return False
        return any(
            self._has_examples(name, moved, num_examples)
            and not _is_identity(moved.index, moved.shape[moved.dim])
            for moved in find(args, kwargs or {})
        )

    def _has_examples(self, name: str, moved: _Moved, num_examples: int) -> bool:
        shape, k, tensor, *_, least = moved
        if not -len(shape) <= k < len(shape) or isinstance(tensor, nn.Parameter):
            return False
        k %= len(shape)
        place = (name, len(shape), k, shape[k])
        if shape[k] % num_examples:
            if k:
                self._fixed.add(place)
            return False
        if place in self._fixed:
            return False
        if shape[k] == num_examples:
            return shape.count(num_examples) >= least
        is_behind = shape[k] == 0 or num_examples in shape[:k] or least > 1
        return not is_behind and not self._is_constant(tensor)

    def _is_constant(self, tensor: Tensor | None) -> bool:
        if tensor is None:
            return False
        return id(tensor) in self._constants or id(tensor._base) in self._constants


def _find(name: str) -> Find | None:
    """What finds the moved dimensions of a function of this name, in place or not."""
    if name in _FINDS:
        return _FINDS[name]
    name = name.partition(".")[0]  # of torch.ops: index_select.default
    return _FINDS.get(name) or (None if name.endswith("__") else _FINDS.get(name.removesuffix("_")))


def _argument(args: Any, kwargs: Any, position: int, *names: str) -> Any:
    """An argument by its position or name; None: it was not given."""
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _input(args: Any, kwargs: Any) -> Any:
    return _argument(args, kwargs, 0, "input", "self")


def _along(position: int, default: int | None, *, is_last: bool = False) -> Find:
    """Rows move along the dimensions at this position, and behind it where nothing else follows;
    None: along all."""

    def find(args: Any, kwargs: Any) -> Iterator[_Moved]:
        x = _input(args, kwargs)
        if not isinstance(x, Tensor):
            return
        dims = _argument(args, kwargs, position, "dim", "dims", "axis")
        dims = default if dims is None else dims
        if isinstance(dims, int):
            dims = [dims, *(k for k in args[position + 1 :] if is_last and isinstance(k, int))]
        for k in range(x.ndim) if dims is None else dims:
            yield _Moved(tuple(x.shape), k, x)

    return find


def _by_index(args: Any, kwargs: Any) -> Iterator[_Moved]:
    """`index_select(x, dim, index)`."""
    index = _argument(args, kwargs, 2, "index")
    for moved in _along(1, None)(args, kwargs):
        yield moved._replace(index=index)


def _is_identity(index: Any, size: int) -> bool:
    """Whether an index takes each row from its own place."""
    if isinstance(index, list | range):
        return len(index) == size and all(type(i) is int and i == k for k, i in enumerate(index))
    if not isinstance(index, Tensor) or index.numel() != size or index.dtype == torch.bool:
        return False
    return bool((index.flatten() == torch.arange(size, device=index.device)).all())


def _read(args: Any, kwargs: Any) -> Iterator[_Moved]:
    """`x[index]`: rows move where it is indexed by a tensor or a list."""
    x, index = args
    for k, item in _items(x, index):
        if not isinstance(item, slice | int):
            yield _Moved(tuple(x.shape), k, x, item)


def _written(args: Any, kwargs: Any) -> Iterator[_Moved]:
    """`x[index] = value`: rows move unless whole dimensions are written, or one number."""
    x, index, value = args
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    for k, item in _items(x, index):
        if not (isinstance(item, slice) and item == slice(None)):
            yield _Moved(tuple(x.shape), k, x, item)


def _items(x: Tensor, index: Any) -> Iterator[tuple[int, Any]]:
    """Each dimension with what it is indexed by; a mask comes once for each of its dimensions."""
    items = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    used = [i.ndim if isinstance(i, Tensor) and i.dtype in _MASKS else 1 for i in items]
    k = 0
    for item, n in zip(items, used, strict=True):
        if item is Ellipsis:
            k += x.ndim - (sum(used) - 1)
            continue
        for dim in range(k, k + n):
            yield dim, item
        k += n


_MASKS = (torch.bool, torch.uint8)


def _joined(default: int, *, is_new: bool) -> Find:
    """Pieces are put one behind the other: along a dimension, or along a new one."""

    def find(args: Any, kwargs: Any) -> Iterator[_Moved]:
        pieces = [x for x in _argument(args, kwargs, 0, "tensors") if isinstance(x, Tensor)]
        if len(pieces) < 2:
            return
        k = _argument(args, kwargs, 1, "dim", "axis")
        k = default if k is None else k
        largest = max(pieces, key=lambda x: x.ndim)
        shape = list(largest.shape)
        if is_new or not shape:
            shape.insert(k % (len(shape) + 1), len(pieces))
        else:
            k %= len(shape)
            shape[k] = sum(x.shape[k] for x in pieces if x.ndim == len(shape))
        yield _Moved(tuple(shape), k)
        if len(shape) == 1:  # vstack and column_stack make a new dimension of rows
            yield _Moved((len(pieces),), 0)

    return find


def _looked_up(args: Any, kwargs: Any) -> Iterator[_Moved]:
    """Rows of a matrix of data: `F.embedding(ids, matrix)`, `torch.embedding(matrix, ids)`."""
    for x in (*args[:2], kwargs.get("weight")):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            yield _Moved(tuple(x.shape), 0, x)


def _multiplied(args: Any, kwargs: Any) -> Iterator[_Moved]:
    """A product with a square matrix of examples, which may be a permutation."""
    operands = [y for x in (*args, *kwargs.values()) for y in (x if _is_list(x) else [x])]
    for x in operands:
        if not isinstance(x, Tensor) or x.ndim < 2:
            continue
        shape = tuple(x.shape)
        if x.ndim > 2:
            yield from (_Moved(shape, k, x, least=2) for k in range(1, x.ndim))
        elif shape[0] == shape[1]:
            yield _Moved(shape, 0, x)


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _always(args: Any, kwargs: Any) -> Iterable[_Moved]:
    """Rows may move along all dimensions."""
    return _along(_NONE, None)(args, kwargs)


def _names(names: str, find: Find) -> dict[str, Find]:
    return dict.fromkeys(names.split(), find)


_FINDS: dict[str, Find] = {
    "__getitem__": _read,
    "__setitem__": _written,
    "index_select": _by_index,
    **_names("gather scatter scatter_add scatter_reduce", _along(1, None)),
    **_names("index_add index_copy index_reduce", _along(1, None)),
    **_names("take_along_dim repeat_interleave roll", _along(2, None)),
    "topk": _along(2, -1),
    "sort": _along(1, -1),
    "flip": _along(1, None, is_last=True),
    **_names("flipud msort __reversed__", _along(_NONE, 0)),
    "fliplr": _along(_NONE, 1),
    **_names("cat concat concatenate vstack row_stack", _joined(0, is_new=False)),
    **_names("hstack column_stack", _joined(1, is_new=False)),
    "stack": _joined(0, is_new=True),
    "embedding": _looked_up,
    **_names("matmul mm bmm mv einsum tensordot linear addmm baddbmm", _multiplied),
    **_names("__matmul__ __rmatmul__ _sparse_mm sparse_mm dot inner", _multiplied),
    **_names("masked_select masked_scatter take put index index_put unique", _always),
    **_names("unique_consecutive rot90", _always),
    **_names("_pack_padded_sequence _pad_packed_sequence as_strided", _always),
    **_names("tolist numpy __array__ __dlpack__", _always),
}
"""Functions that may move rows, by name."""
