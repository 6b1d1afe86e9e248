"""From data and an order to the batch of each update.

    batch t = data[order.indices(t)],    key = (seed, t)

or a share of it, where other ranks read the others.

Data are tensors, arrays, `Rows`, or tuples and dicts of these with the examples first; or else
anything with a length and an index, such as a list of examples, a map-style data set, a Hugging
Face `Dataset`.
"""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from anybatch import batch as pytrees
from anybatch.batch import Uncollated
from anybatch.errors import DataError
from anybatch.order import OrderProtocol
from anybatch.randomness import ExampleKey, Key, fold
from anybatch.training.workers import in_workers

__all__ = ["Batch", "Rows", "batches", "num_examples", "reader"]

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
            seed, listed = fold(order.seed, start), reading.listed
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
    if _is_pytree(data):
        return pytrees.size(tree_map(_with_a_length, data))
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not indexed or isinstance(data, IterableDataset):
        raise DataError(
            f"expected data with a length and an index (a map-style data set, tensors), got "
            f"{type(data).__name__}. An iterable without an index cannot be put in a keyed order: "
            f"list() it, write it to a file first, or pass the data set inside a DataLoader."
        )
    return len(data)


def reader(data: Any, *, raw: bool = False) -> Callable[[Tensor], Any]:
    """A function from ids [B] to their examples: a batch, or a list of examples if raw."""
    if type(data) is TensorDataset:  # a subclass may do more on reading
        data = data.tensors
    if _is_pytree(data):
        leaves, shape = tree_flatten(data)
        if raw:
            return lambda ids: [
                tree_unflatten(row, shape)
                for row in zip(*(_rows(leaf, ids) for leaf in leaves), strict=True)
            ]
        return lambda ids: tree_unflatten([_tensor(_rows(leaf, ids)) for leaf in leaves], shape)
    fetch = getattr(data, "__getitems__", None) or (lambda ids: [data[i] for i in ids])
    if raw:
        return lambda ids: fetch(ids.tolist())
    return lambda ids: default_collate(fetch(ids.tolist()))


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
        return changed if self.listed else default_collate(changed)

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
        columns = tree_leaves(self.data) if _is_pytree(self.data) else []
        return [column.soon for column in columns if hasattr(column, "soon")]

    @cached_property
    def _read(self) -> Callable[[Tensor], Any]:
        return reader(self.data, raw=self.listed or self.transform is not None)


def _check_workers(workers: Any, data: Any) -> None:
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        raise DataError(
            f"workers = {workers!r}, expected a number of processes from 0 on: 0 reads between "
            f"the updates, 2 are enough where reading takes no longer than the update."
        )
    leaves = tree_leaves(data) if workers and _is_pytree(data) else []
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


def _is_pytree(data: Any) -> bool:
    """Whether data are columns, alone or in tuples and dicts; a list holds examples.

    Raises:
        DataError: a tuple or dict of something else.
    """
    if isinstance(data, Tensor | np.ndarray) or _is_rows(data):
        return True
    if not isinstance(data, tuple | dict):
        return False
    for leaf in (leaves := tree_leaves(data)):
        if not (isinstance(leaf, Tensor | np.ndarray) or _is_rows(leaf)):
            raise DataError(
                f"expected a {type(data).__name__} of data to hold tensors or arrays with the "
                f"examples first, got a {type(leaf).__name__} in it. Make it one, or pass a list "
                f"of examples (and collate=...), or one data set instead of several."
            )
    return bool(leaves)


def _with_a_length(leaf: Any) -> Any:
    return torch.empty(len(leaf), 0) if _is_rows(leaf) else leaf  # stands for as many examples


def _rows(leaf: Any, ids: Tensor) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, ids.to(leaf.device))  # several times as fast as leaf[ids]
    return leaf[ids.numpy()] if isinstance(leaf, np.ndarray) else leaf.rows(ids)


def _tensor(rows: Any) -> Tensor:
    return rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
