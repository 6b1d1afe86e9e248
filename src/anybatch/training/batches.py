"""From data and an order to the batch of each update.

    batch t = data[order.indices(t)],    key = (seed, t)

Data are tensors, arrays, or tuples and dicts of these with the examples first; or else anything
with a length and an index, such as a list of examples, a map-style data set, a Hugging Face
`Dataset`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from anybatch import batch as pytrees
from anybatch.batch import Uncollated
from anybatch.errors import DataError
from anybatch.order import Order, OrderProtocol
from anybatch.randomness import ExampleKey, Key

__all__ = ["Batch", "batches", "num_examples", "reader"]

Collate = Callable[[Sequence[Any]], Any]
Transform = Callable[[Any, ExampleKey], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The examples of one update."""

    examples: Any  # a pytree, or `Uncollated` where `collate` runs per micro-batch
    ids: Tensor  # [B] int64: their indices in the data
    key: Key  # of the model's random numbers
    step: int  # number of the update, from 0
    epoch: int  # of the first example


def batches(
    data: Any,
    order: OrderProtocol,
    start: int = 0,
    *,
    stop: int | None = None,
    collate: Collate | None = None,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """The batches of updates start .. stop-1, without end where stop is None.

    Args:
        data: what the order's indices point into. What it draws at random is not keyed: augment
            in `transform`.
        order: `indices(step)`, see `Order`.
        start: first update; any, at no cost.
        collate: examples to a batch, called for each micro-batch; None: torch's `default_collate`
            for the whole batch, or indexing where the data are tensors.
        transform: `(example, key) -> example`, key of (seed, epoch, id).

    Raises:
        DataError: data without an index, or an order made for another number of examples.
    """
    found, expected = num_examples(data), getattr(order, "num_examples", None)
    if expected is not None and expected != found:
        raise DataError(
            f"the order is over {expected} examples, but the data hold {found}. Make it with "
            f"ab.Order({found}, ...); len() of a tuple of tensors is the number of tensors."
        )
    read = reader(data, raw=collate is not None or transform is not None)
    step = start
    while stop is None or step < stop:
        ids, epoch = order.indices(step), order.epoch(step)
        examples = read(ids)
        if transform is not None:
            keys = _example_keys(order, step, ids)
            examples = [transform(x, key) for x, key in zip(examples, keys, strict=True)]
        if collate is not None:
            examples = Uncollated(examples, collate)
        elif transform is not None:
            examples = default_collate(examples)
        yield Batch(examples=examples, ids=ids, key=Key(order.seed, step), step=step, epoch=epoch)
        step += 1


def num_examples(data: Any) -> int:
    """How many examples data hold.

    Raises:
        DataError: data without a length and an index.
    """
    if _is_pytree(data):
        return pytrees.size(data)
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
        if raw:
            return lambda ids: [_row(data, i) for i in ids.tolist()]
        leaves, shape = tree_flatten(data)
        return lambda ids: tree_unflatten([_rows(leaf, ids) for leaf in leaves], shape)
    fetch = getattr(data, "__getitems__", None) or (lambda ids: [data[i] for i in ids])
    if raw:
        return lambda ids: fetch(ids.tolist())
    return lambda ids: default_collate(fetch(ids.tolist()))


def _example_keys(order: OrderProtocol, step: int, ids: Tensor) -> list[ExampleKey]:
    """A key for each visit of an example, whatever batch it falls into."""
    epochs = [order.epoch(step)] * len(ids)
    if isinstance(order, Order) and order.last == "carry":  # a batch may go on into the next epoch
        first = order.examples_before(step)
        epochs = [place // order.num_examples for place in range(first, first + len(ids))]
    return [ExampleKey(order.seed, e, i) for e, i in zip(epochs, ids.tolist(), strict=True)]


def _is_pytree(data: Any) -> bool:
    """Whether data are tensors or arrays, alone or in tuples and dicts; a list holds examples.

    Raises:
        DataError: a tuple or dict of something else.
    """
    if isinstance(data, Tensor | np.ndarray):
        return True
    if not isinstance(data, tuple | dict):
        return False
    for leaf in (leaves := tree_leaves(data)):
        if not isinstance(leaf, Tensor | np.ndarray):
            raise DataError(
                f"expected a {type(data).__name__} of data to hold tensors or arrays with the "
                f"examples first, got a {type(leaf).__name__} in it. Make it one, or pass a list "
                f"of examples (and collate=...), or one data set instead of several."
            )
    return bool(leaves)


def _rows(leaf: Tensor | np.ndarray, ids: Tensor) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.index_select(0, ids.to(leaf.device))  # several times as fast as leaf[ids]
    return torch.from_numpy(leaf[ids.numpy()])


def _row(data: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index], data)
