"""Read examples of data by their ids.

Data are tensors, arrays, `Rows`, or tuples and dicts of these with the examples first. Or they are
any object with a length and an index: a list of examples, a map-style data set, a Hugging Face
`Dataset`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from os import PathLike
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from anybatch import pytree
from anybatch._torch import tree_flatten, tree_unflatten
from anybatch.errors import DataError

__all__ = ["Rows", "count_examples", "is_column_tree", "make_reader", "stack_examples"]


@runtime_checkable
class Rows(Protocol):
    """A column that is read when it is needed, for instance from files.

    If it has a method `prefetch(ids)`, the method gets the ids of the next batch ahead of time.
    """

    def __len__(self) -> int:
        """Return the number of examples."""

    def rows(self, ids: Tensor) -> Tensor:
        """Read the rows of ids [B] in order: [B, ...] on the CPU; the caller may change them."""


def count_examples(data: Any) -> int:
    """Count the examples of data.

    Raises:
        DataError: the data have no length or no index.
    """
    if is_column_tree(data):
        return pytree.count_examples(pytree.map_leaves(_stand_in, data), "data")
    _check_index(data)
    return len(data)


def make_reader(data: Any, *, raw: bool = False) -> Callable[[Tensor], Any]:
    """Make a function from ids [B] to their examples: a batch, or a list of examples if raw."""
    if type(data) is TensorDataset:  # a subclass may do more on reading
        data = data.tensors
    if is_column_tree(data):
        if raw:
            return lambda ids: _list_examples(data, ids)
        _check_types(data)
        return lambda ids: pytree.map_leaves(partial(_read_column, ids=ids), data)
    fetch = getattr(data, "__getitems__", None) or (lambda ids: [data[i] for i in ids])
    if raw:
        return lambda ids: fetch(ids.tolist())
    return lambda ids: stack_examples(fetch(ids.tolist()))


def is_column_tree(data: Any) -> bool:
    """Return whether data are columns, alone or in tuples, mappings or dataclasses.

    A list is no column: it holds examples.

    Raises:
        DataError: a tuple, mapping or dataclass holds something else.
    """
    if _is_column(data):
        return True
    is_record = is_dataclass(data) and not hasattr(data, "__getitem__")
    if not isinstance(data, tuple | Mapping) and not is_record:
        return False
    leaves = list(pytree.name_leaves(data, "data"))
    for place, leaf in leaves:
        if not (leaf is None or _is_column(leaf)):
            raise DataError(
                f"{place} is of type {type(leaf).__name__}. Data in a {type(data).__name__} must "
                f"be tensors or arrays with the examples as their first dimension. Make it one, or "
                f"pass a list of examples with collate=..., or a single data set."
            )
    return any(leaf is not None for _, leaf in leaves)


def stack_examples(examples: Sequence[Any]) -> Any:
    """Collate examples by torch's `default_collate`.

    Raises:
        DataError: the examples cannot be stacked.
    """

    def prepare(leaf: Any) -> Any:
        return pytree.to_native(leaf) if isinstance(leaf, np.ndarray) else leaf

    first = examples[0]
    if is_dataclass(first) and all(type(example) is type(first) for example in examples):
        parts = stack_examples([pytree.get_contents(example) for example in examples])
        return pytree.rebuild(first, parts)
    if any(prepare(leaf) is not leaf for leaf in pytree.list_leaves(first)):  # as in all the others
        examples = [pytree.map_leaves(prepare, example) for example in examples]
    try:
        return default_collate(list(examples))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"The examples cannot be stacked into a batch: {error}. Tensors of one shape, numbers "
            f"and dicts or tuples of them can. Give collate=..., such as ab.Pad() for sequences of "
            f"several lengths."
        ) from error


def _list_examples(data: Any, ids: Tensor) -> list[Any]:
    """Read a list of examples; flattening once is faster than flattening each example."""
    leaves, shape = tree_flatten(data)
    columns = [_list_values(leaf, ids) for leaf in leaves]
    return [tree_unflatten(row, shape) for row in zip(*columns, strict=True)]


def _list_values(leaf: Any, ids: Tensor) -> Iterable[Any]:
    parts = pytree.get_contents(leaf)
    if parts is not None:
        return [pytree.rebuild(leaf, row) for row in _list_examples(parts, ids)]
    return [None] * len(ids) if leaf is None else _take_rows(leaf, ids)


def _is_rows(leaf: Any) -> TypeGuard[Rows]:
    """Return whether a leaf is read by rows; an object with an index is a data set."""
    return isinstance(leaf, Rows) and not hasattr(leaf, "__getitem__")


def _is_column(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) or _is_rows(leaf)


def _check_index(data: Any) -> None:
    """Raise if data have no examples by index, and say what to pass."""
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        advice = "a DataLoader, which has an order of its own. Pass its parts: data=loader.dataset "
        advice += "and, unless it is torch's default, collate=loader.collate_fn. In a loop of your "
        advice += (
            "own, DataLoader(data, batch_sampler=order.sampler()) reads the batches of an order"
        )
    elif hasattr(data, "iloc"):
        advice = f"a pandas {kind}, whose index need not be the position. Pass its columns as "
        advice += "arrays, such as (frame[features].to_numpy(), frame[target].to_numpy())"
    elif isinstance(data, str | bytes | PathLike):
        advice = f"a {kind}. Read the file first, and pass its examples"
    elif isinstance(data, IterableDataset) or not _has_index(data):
        advice = f"of type {kind}, without a length and an index by position. An iterable cannot "
        advice += "be put in a keyed order: pass list(data), or write it to a file first"
    else:
        return
    raise DataError(f"The data are {advice}.")


def _has_index(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, type)


def _stand_in(leaf: Any) -> Any:
    """Replace rows by an empty tensor of their length."""
    return torch.empty(len(leaf), 0) if _is_rows(leaf) else leaf


def _read_column(leaf: Any, ids: Tensor) -> Any:
    """Read rows of a column; arrays become tensors."""
    return _to_tensor(_take_rows(leaf, ids))


def _take_rows(leaf: Any, ids: Tensor) -> Any:
    if leaf is None:
        return None
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, ids.to(leaf.device))  # several times as fast as leaf[ids]
    return leaf[ids.numpy()] if isinstance(leaf, np.ndarray) else leaf.rows(ids)


def _to_tensor(rows: Any) -> Any:
    return torch.from_numpy(pytree.to_native(rows)) if isinstance(rows, np.ndarray) else rows


def _check_types(data: Any) -> None:
    """Raise if an array holds objects, strings or dates, which torch has no type for."""
    for place, leaf in pytree.name_leaves(data, "data"):
        if not isinstance(leaf, np.ndarray):
            continue
        try:
            _to_tensor(leaf[:0])
        except TypeError as error:
            raise DataError(
                f"{place} is an array of {leaf.dtype}, which torch has no type for. Convert it, "
                f"such as by astype('float32'), or give collate=..., which gets the examples."
            ) from error
