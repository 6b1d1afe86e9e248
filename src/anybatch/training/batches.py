"""From data and an order to the batch of each update.

    batch t = data[order.indices(t)],    key = (seed, t)

Data are anything with a length and an index: a map-style data set, a Hugging Face `Dataset`,
a tensor, an array, or a pytree of these with the examples first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import TensorDataset, default_collate

from anybatch import batch as pytrees
from anybatch.batch import Uncollated
from anybatch.errors import DataError
from anybatch.order import OrderProtocol
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
        data: what the order's indices point into.
        order: `indices(step)`, see `Order`.
        start: first update; any, at no cost.
        collate: examples to a batch, called for each micro-batch; None: torch's `default_collate`
            for the whole batch, or indexing where the data are tensors.
        transform: `(example, key) -> example`, key of (seed, epoch, id).

    Raises:
        DataError: an order made for another number of examples.
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
            keys = [ExampleKey(order.seed, epoch, int(i)) for i in ids]
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
        DataError: none, or data without a length.
    """
    if _is_pytree(data):
        return pytrees.size(data)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"expected data with a length and an index (a map-style data set, tensors), got "
            f"{type(data).__name__}. An iterable without an index cannot be put in a keyed order: "
            f"list it, or write it to a file first."
        )
    return len(data)


def reader(data: Any, *, raw: bool = False) -> Callable[[Tensor], Any]:
    """A function from ids [B] to their examples: a batch, or a list of examples if raw."""
    if isinstance(data, TensorDataset):
        data = data.tensors
    if _is_pytree(data):
        if raw:
            return lambda ids: [_row(data, int(i)) for i in ids]
        return lambda ids: tree_map(lambda leaf: _rows(leaf, ids), data)
    fetch = getattr(data, "__getitems__", None) or (lambda ids: [data[i] for i in ids])
    if raw:
        return lambda ids: fetch(ids.tolist())
    return lambda ids: default_collate(fetch(ids.tolist()))


def _is_pytree(data: Any) -> bool:
    """Whether data are tensors or arrays, alone or in tuples, lists and dicts."""
    if not isinstance(data, Tensor | np.ndarray | tuple | list | dict):
        return False
    leaves = tree_leaves(data)
    return bool(leaves) and all(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves)


def _rows(leaf: Tensor | np.ndarray, ids: Tensor) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf[ids.to(leaf.device)]
    return torch.from_numpy(leaf[ids.numpy()])


def _row(data: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index], data)
