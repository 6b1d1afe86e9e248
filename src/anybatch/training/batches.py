"""From data and an order to the batch of each update.

    batch t = data[order.indices(t)],    key = (seed, t)

or a share of it, where other ranks read the others.

Data are tensors, arrays, `Rows`, or tuples and dicts of these with the examples first; or else
anything with a length and an index, such as a list of examples, a map-style data set, a Hugging
Face `Dataset`.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from os import PathLike
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from anybatch import pytree
from anybatch._torch import tree_flatten, tree_unflatten
from anybatch.batch import is_count
from anybatch.errors import DataError
from anybatch.gradient.arguments import check_arguments
from anybatch.order import OrderProtocol
from anybatch.pytree import Uncollated
from anybatch.randomness import ExampleKey, Key, hash_integers
from anybatch.training.workers import in_workers

__all__ = ["Batch", "Rows", "batches", "is_column_tree", "num_examples", "reader"]

Collate = Callable[[Sequence[Any]], Any]
Transform = Callable[[Any, ExampleKey], Any]
Cut = Callable[[int], slice]  # number of examples of a batch -> which of them are to be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The examples of one update, or a share of them."""

    examples: Any  # a pytree, or `Uncollated` where `collate` runs per micro-batch
    ids: Tensor  # [B] int64: their indices in the data
    key: Key  # of the model's random numbers
    step: int  # number of the update, from 0
    epoch: int  # of the first example


@runtime_checkable
class Rows(Protocol):
    """A column that is read when it is needed, from files for instance.

    If it has a method `soon(ids)`, this is told what will be read next, a batch ahead.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of these ids [B], in their order: [B, ...] on the CPU, the caller's to change."""


@check_arguments
def batches(
    data: Any,
    order: OrderProtocol,
    start: int = 0,
    *,
    stop: int | None = None,
    collate: Collate | None = None,
    transform: Transform | None = None,
    workers: int = 0,
    share: Cut | None = None,
) -> Generator[Batch]:
    """The batches of updates start .. stop-1, without end where stop is None.

    Args:
        data: what the order's indices point into. What it draws at random is not keyed: augment
            in `transform`.
        order: `indices(step)`, see `Order`.
        start: first update; any, at no cost.
        collate: examples to a batch, called for each micro-batch; None: torch's `default_collate`
            for the whole batch, or indexing where the data are tensors.
        transform: `(example, key) -> example`, key of (seed, epoch, id).
        workers: processes that read and transform ahead of the loop, each with one thread, where
            that is slow; 0: none. The batches are the same.
        share: what of a batch is read, as a function of its number of examples: this rank's
            share, which may be empty; None: all of it.

    Raises:
        DataError: data without an index, or an order made for another number of examples; workers
            that are no number, or cannot reach the data.
    """
    found, expected = num_examples(data), getattr(order, "num_examples", None)
    if expected is not None and expected != found:
        raise DataError(
            f"the order is over {expected} examples, but the data hold {found}. Make it with "
            f"ab.Order({found}, ...); len() of a tuple of tensors is the number of tensors."
        )
    _check_workers(workers, data)
    reading = _Reading(data, order, transform, share, listed=collate is not None)
    steps = range(start, sys.maxsize if stop is None else stop)
    with ExitStack() as stack:
        if workers:
            seed, listed = hash_integers(order.seed, start), reading.listed
            ahead = in_workers(reading.of_step, steps, workers, seed=seed, listed=listed)
            stack.enter_context(closing(ahead))
        for step in steps:
            ids, epoch = reading.ids(step), order.epoch(step)
            examples = next(ahead) if workers else reading(step, ids)
            if not workers and step + 1 < steps.stop:
                reading.announce(step + 1)
            if collate is not None:
                examples = Uncollated(examples, collate)
            key = Key(order.seed, step)
            yield Batch(examples=examples, ids=ids, key=key, step=step, epoch=epoch)


def num_examples(data: Any) -> int:
    """How many examples data hold.

    Raises:
        DataError: data without a length and an index.
    """
    if is_column_tree(data):
        return pytree.count_examples(pytree.map_leaves(_with_a_length, data), "data")
    _check_indexed(data)
    return len(data)


def reader(data: Any, *, raw: bool = False) -> Callable[[Tensor], Any]:
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
    return lambda ids: _stack(fetch(ids.tolist()))


def _examples(data: Any, ids: Tensor) -> list[Any]:
    """Read examples one by one; flattened once, as that takes longer than to read a row."""
    leaves, shape = tree_flatten(data)
    columns = [_column(leaf, ids) for leaf in leaves]
    return [tree_unflatten(row, shape) for row in zip(*columns, strict=True)]


def _column(leaf: Any, ids: Tensor) -> Iterable[Any]:
    parts = pytree.get_contents(leaf)
    if parts is not None:
        return [pytree.rebuild(leaf, row) for row in _examples(parts, ids)]
    return [None] * len(ids) if leaf is None else _rows(leaf, ids)


@dataclass(frozen=True)
class _Reading:
    """What is done for each step where data are read, here or in a worker."""

    data: Any
    order: OrderProtocol
    transform: Transform | None
    share: Cut | None
    listed: bool  # the examples are to stay apart

    def __call__(self, step: int, ids: Tensor) -> Any:
        if not len(ids):  # no place for the shapes of examples to come from
            return [] if self.listed else Uncollated((), tuple)
        examples = self._read(ids)
        if self.transform is None:
            return examples
        keys = self._keys(step, ids)
        changed = [self.transform(x, key) for x, key in zip(examples, keys, strict=True)]
        return changed if self.listed else _stack(changed)

    def of_step(self, step: int) -> Any:
        return self(step, self.ids(step))

    def ids(self, step: int) -> Tensor:
        """Of the examples to be read."""
        ids = self.order.indices(step)
        return ids if self.share is None else ids[self.share(len(ids))]

    def announce(self, step: int) -> None:
        if self._announced:
            ids = self.ids(step)
            for soon in self._announced:
                soon(ids)

    def _keys(self, step: int, ids: Tensor) -> list[ExampleKey]:
        """A key for each visit of an example, whatever batch it falls into."""
        order, visits = self.order, getattr(self.order, "visits", None)
        epochs = [order.epoch(step)] * len(ids) if visits is None else visits(step)
        if visits is not None and self.share is not None:
            epochs = epochs[self.share(len(epochs))]
        return [ExampleKey(order.seed, e, i) for e, i in zip(epochs, ids.tolist(), strict=True)]

    @cached_property
    def _announced(self) -> list[Callable[[Tensor], None]]:
        columns = pytree.list_leaves(self.data) if is_column_tree(self.data) else []
        return [column.soon for column in columns if hasattr(column, "soon")]

    @cached_property
    def _read(self) -> Callable[[Tensor], Any]:
        return reader(self.data, raw=self.listed or self.transform is not None)


def _check_workers(workers: Any, data: Any) -> None:
    if workers != 0 and not is_count(workers):
        raise DataError(
            f"workers = {workers!r}, expected a number of processes from 0 on: 0 reads between "
            f"the updates, 2 are enough where reading takes no longer than the update."
        )
    leaves = pytree.list_leaves(data) if workers and is_column_tree(data) else []
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} - {"cpu"}
    if devices:
        raise DataError(
            f"the data are on {devices.pop()!r} and workers = {workers}, expected data on the CPU: "
            f"a worker process has no access to the accelerator. Take workers=0: rows are gathered "
            f"where the data are."
        )


def _is_rows(leaf: Any) -> TypeGuard[Rows]:
    """Whether it is read by row; what has an index is a data set."""
    return isinstance(leaf, Rows) and not hasattr(leaf, "__getitem__")


def _is_column(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | np.ndarray) or _is_rows(leaf)


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
    return torch.from_numpy(pytree.to_native(rows)) if isinstance(rows, np.ndarray) else rows


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


def _stack(examples: Sequence[Any]) -> Any:
    """Collate examples by torch's `default_collate`.

    Raises:
        DataError: examples that cannot be stacked.
    """

    def prepare(leaf: Any) -> Any:
        return pytree.to_native(leaf) if isinstance(leaf, np.ndarray) else leaf

    first = examples[0]
    if is_dataclass(first) and all(type(example) is type(first) for example in examples):
        return pytree.rebuild(first, _stack([pytree.get_contents(example) for example in examples]))
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
