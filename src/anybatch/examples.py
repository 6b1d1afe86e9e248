"""Examples of data by their ids.

Data are tensors, arrays, `Rows`, or tuples and dicts of these with the examples first; or else
anything with a length and an index, such as a list of examples, a map-style data set, a Hugging
Face `Dataset`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from os import PathLike
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from anybatch import pytree
from anybatch.errors import DataError

__all__ = ["Rows", "count_examples", "is_column_tree", "make_reader", "stack_examples"]


@runtime_checkable
class Rows(Protocol):
    """A column that is read when it is needed, from files for instance.

    If it has a method `soon(ids)`, this is told what will be read next, a batch ahead.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of these ids [B], in their order: [B, ...] on the CPU, the caller's to change."""


def count_examples(data: Any) -> int:
    """How many examples data hold.

    Raises:
        DataError: data without a length and an index.
    """
    if is_column_tree(data):
        return pytree.length(pytree.map_leaves(_with_a_length, data), "data")
    _check_indexed(data)
    return len(data)


def make_reader(data: Any, *, raw: bool = False) -> Callable[[Tensor], Any]:
    """A function from ids [B] to their examples: a batch, or a list of examples if raw."""
    if type(data) is TensorDataset:  # a subclass may do more on reading
        data = data.tensors
    if is_column_tree(data):
        if raw:
            return lambda ids: _examples(data, ids)
        _check_types(data)
        return lambda ids: pytree.map_leaves(lambda leaf: _tensor(_rows(leaf, ids)), data)
    fetch = getattr(data, "__getitems__", None) or (lambda ids: [data[i] for i in ids])
    if raw:
        return lambda ids: fetch(ids.tolist())
    return lambda ids: stack_examples(fetch(ids.tolist()))


def is_column_tree(data: Any) -> bool:
    """Whether data are columns, alone or in tuples, mappings or dataclasses; a list has examples.

    Raises:
        DataError: a tuple, mapping or dataclass of something else.
    """
    if _is_column(data):
        return True
    is_record = is_dataclass(data) and not hasattr(data, "__getitem__")
    if not isinstance(data, tuple | Mapping) and not is_record:
        return False
    named = list(pytree.name_leaves(data, "data"))
    for place, leaf in named:
        if not (leaf is None or _is_column(leaf)):
            raise DataError(
                f"{place} is of type {type(leaf).__name__}. Data in a {type(data).__name__} must "
                f"be tensors or arrays with the examples as their first dimension. Make it one, or "
                f"pass a list of examples with collate=..., or one data set instead of several."
            )
    return any(leaf is not None for _, leaf in named)


def stack_examples(examples: Sequence[Any]) -> Any:
    """Collate examples by torch's `default_collate`.

    Raises:
        DataError: examples that cannot be stacked.
    """

    def prepare(leaf: Any) -> Any:
        return pytree.native(leaf) if isinstance(leaf, np.ndarray) else leaf

    first = examples[0]
    if is_dataclass(first) and all(type(example) is type(first) for example in examples):
        return pytree.rebuild(
            first, stack_examples([pytree.parts_of(example) for example in examples])
        )
    if any(prepare(leaf) is not leaf for leaf in pytree.leaves(first)):  # as in all the others
        examples = [pytree.map_leaves(prepare, example) for example in examples]
    try:
        return default_collate(list(examples))
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"The examples cannot be stacked into a batch: {error}. Tensors of one shape, numbers "
            f"and dicts or tuples of them can. Give collate=..., such as ab.Pad() for sequences of "
            f"several lengths."
        ) from error


def _examples(data: Any, ids: Tensor) -> list[Any]:
    """Read examples one by one; flattened once, as that takes longer than to read a row."""
    leaves, shape = tree_flatten(data)
    columns = [_column(leaf, ids) for leaf in leaves]
    return [tree_unflatten(row, shape) for row in zip(*columns, strict=True)]


def _column(leaf: Any, ids: Tensor) -> Iterable[Any]:
    parts = pytree.parts_of(leaf)
    if parts is not None:
        return [pytree.rebuild(leaf, row) for row in _examples(parts, ids)]
    return [None] * len(ids) if leaf is None else _rows(leaf, ids)


def _is_rows(leaf: Any) -> TypeGuard[Rows]:
    """Whether it is read by row; what has an index is a data set."""
    return isinstance(leaf, Rows) and not hasattr(leaf, "__getitem__")


def _is_column(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) or _is_rows(leaf)


def _check_indexed(data: Any) -> None:
    """Refuse what has no examples by index, and say what to pass in its place."""
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        advice = "a DataLoader, which has an order of its own. Pass its parts: data=loader.dataset "
        advice += "and, unless it is torch's default, collate=loader.collate_fn"
    elif hasattr(data, "iloc"):
        advice = f"a pandas {kind}, whose index need not be the position. Pass its columns as "
        advice += "arrays, such as (frame[features].to_numpy(), frame[target].to_numpy())"
    elif isinstance(data, str | bytes | PathLike):
        advice = f"a {kind}. Read the file first, and pass its examples"
    elif isinstance(data, IterableDataset) or not _is_indexed(data):
        advice = f"of type {kind}, without a length and an index by position. An iterable cannot "
        advice += "be put in a keyed order: pass list(data), or write it to a file first"
    else:
        return
    raise DataError(f"The data are {advice}.")


def _is_indexed(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, type)


def _with_a_length(leaf: Any) -> Any:
    return torch.empty(len(leaf), 0) if _is_rows(leaf) else leaf  # stands for as many examples


def _rows(leaf: Any, ids: Tensor) -> Any:
    if leaf is None:
        return None
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, ids.to(leaf.device))  # several times as fast as leaf[ids]
    return leaf[ids.numpy()] if isinstance(leaf, np.ndarray) else leaf.rows(ids)


def _tensor(rows: Any) -> Any:
    return torch.from_numpy(pytree.native(rows)) if isinstance(rows, np.ndarray) else rows


def _check_types(data: Any) -> None:
    """Refuse arrays of objects, strings or dates, which torch has no type for."""
    for place, leaf in pytree.name_leaves(data, "data"):
        if not isinstance(leaf, np.ndarray):
            continue
        try:
            _tensor(leaf[:0])
        except TypeError as error:
            raise DataError(
                f"{place} is an array of {leaf.dtype}, which torch has no type for. Convert it, "
                f"such as by astype('float32'), or give collate=..., which gets the examples."
            ) from error
