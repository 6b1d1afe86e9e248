"""Batches of all updates, from data and an order, and the share of each rank.

    batch t = data[order.indices(t)],    key = (seed, t)
    share of rank r of W  =  grains  floor(r G / W) .. floor((r + 1) G / W) - 1  of the batch's G

A share is a range of examples, and holds whole grains if the objective has any. With fewer grains
than ranks, some shares are empty. The grains are those of `layout.grains`.
"""

import logging
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from anybatch import distributed, pytree
from anybatch.batch import is_count
from anybatch.distributed import ProcessGroup
from anybatch.errors import DataError
from anybatch.examples import count_examples, is_column_tree, make_reader, stack_examples
from anybatch.gradient.arguments import check_arguments
from anybatch.gradient.survey import find_grain_reason
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.pytree import Uncollated
from anybatch.randomness import ExampleKey, Key, hash_integers
from anybatch.workers import read_in_workers

__all__ = ["Batch", "Share", "batches", "choose_share", "share_evenly"]

_log = logging.getLogger(__name__)

Collate = Callable[[Sequence[Any]], Any]
Transform = Callable[[Any, ExampleKey], Any]
Cut = Callable[[int], slice]  # number of examples of a batch -> the range to read


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples of one update, or a share of them."""

    examples: Any  # a pytree, or `Uncollated` if `collate` runs per micro-batch
    ids: Tensor  # [B] int64: their indices in the data
    key: Key  # of the model's random numbers
    step: int  # number of the update, from 0
    epoch: int  # of the first example


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's range of every batch, as a function of the number of examples."""

    rank: int
    num_ranks: int
    grain: int | None  # examples that stay together; None: the whole batch

    def __call__(self, num_examples: int) -> slice:
        """Compute this rank's range of so many examples."""
        size = num_examples if self.grain is None else self.grain
        grains, rest = divmod(num_examples, size)
        if rest >= min(2, size) or grains == 0:  # a single example joins the grain before it
            grains += 1
        cuts = [(self.rank + i) * grains // self.num_ranks for i in (0, 1)]
        start, stop = (num_examples if cut == grains else cut * size for cut in cuts)
        return slice(start, stop)


def share_evenly(group: ProcessGroup | None) -> Share:
    """Return this rank's share of things that may be cut anywhere."""
    return Share(
        rank=distributed.get_rank(group), num_ranks=distributed.get_num_ranks(group), grain=1
    )


def choose_share(
    model: nn.Module, objective: Objective, group: ProcessGroup | None, *, bitwise: bool = False
) -> Share | None:
    """Choose this rank's share of every batch; None: all of it.

    Without a grain, a batch may be cut anywhere. It may not be cut at all if the model draws random
    numbers or couples examples, or if bits must repeat.
    """
    if group is None:
        return None
    per_rank = distributed.all_gather_object(
        lambda: find_grain_reason(model, objective.example_losses), group
    )
    why = next((reason for reason in per_rank if reason is not None), None)
    if bitwise and why is None:
        why = "bitwise=True adds up grains in a fixed order"
    share = share_evenly(group)
    if objective.grain is not None or why is not None:
        share = replace(share, grain=objective.grain)
    if share.grain is None and share.num_ranks > 1 and share.rank == 0:
        _log.warning(
            "%s, and without a grain the whole batch is one: one of %d ranks computes, and the "
            "others wait. Declare Objective(grain=...), a number of examples; it is part of the "
            "objective, since the examples of a grain share their random numbers and statistics.",
            why,
            share.num_ranks,
        )
    return share


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
    """Yield the batches of updates start .. stop-1; endlessly if stop is None.

        >>> import torch
        >>> import anybatch as ab
        >>> data = torch.arange(10.0), torch.arange(10)
        >>> order = ab.Order(10, batch_size=4, seed=0)
        >>> [len(batch.ids) for batch in ab.batches(data, order, stop=3)]
        [4, 4, 2]

    Args:
        data: examples by index; see `examples`. Their own random draws do not depend on keys:
            augment in `transform`.
        order: `indices(step)`, see `Order`.
        start: first update; any, at no cost.
        collate: from a list of examples to a batch, called for each micro-batch. None: torch's
            `default_collate` for the whole batch, or indexing if the data are tensors.
        transform: `(example, key) -> example`, key of (seed, epoch, id).
        workers: processes that read and transform ahead of the loop, each with one thread, if
            reading is slow; 0: none. The batches are the same.
        share: from the number of examples of a batch to the range to read: this rank's share, which
            may be empty. None: the whole batch.

    Raises:
        DataError: the data have no index; the order is for another number of examples; workers is
            no number, or the workers cannot reach the data.
    """
    size, expected = count_examples(data), getattr(order, "num_examples", None)
    if expected is not None and expected != size:
        raise DataError(
            f"the order is over {expected} examples, but the data hold {size}. Make it with "
            f"ab.Order({size}, ...); len() of a tuple of tensors is the number of tensors."
        )
    _check_workers(workers, data)
    reading = _Reading(data, order, transform, share, is_listed=collate is not None)
    steps = range(start, sys.maxsize if stop is None else stop)
    with ExitStack() as stack:
        if workers:
            seed, listed = hash_integers(order.seed, start), reading.is_listed
            ahead = read_in_workers(reading.read_step, steps, workers, seed=seed, listed=listed)
            stack.enter_context(closing(ahead))
        for step in steps:
            ids, epoch = reading.list_ids(step), order.epoch(step)
            examples = next(ahead) if workers else reading.read(step, ids)
            if not workers and step + 1 < steps.stop and reading.listeners:
                reading.announce(step + 1)
            if collate is not None:
                examples = Uncollated(examples, collate)
            key = Key(order.seed, step)
            yield Batch(examples=examples, ids=ids, key=key, step=step, epoch=epoch)


@dataclass(frozen=True)
class _Reading:
    """Reads the examples of a step, in this process or in a worker."""

    data: Any
    order: OrderProtocol
    transform: Transform | None
    share: Cut | None
    is_listed: bool  # whether the examples are returned as a list

    def read(self, step: int, ids: Tensor) -> Any:
        if not ids.numel():  # an empty batch has no shapes
            return [] if self.is_listed else Uncollated((), tuple)
        examples = self._reader(ids)
        if self.transform is None:
            return examples
        keys = self._make_keys(step, ids)
        examples = [self.transform(x, key) for x, key in zip(examples, keys, strict=True)]
        return examples if self.is_listed else stack_examples(examples)

    def read_step(self, step: int) -> Any:
        return self.read(step, self.list_ids(step))

    def list_ids(self, step: int) -> Tensor:
        ids = self.order.indices(step)
        return ids if self.share is None else ids[self.share(len(ids))]

    def announce(self, step: int) -> None:
        ids = self.list_ids(step)
        for listener in self.listeners:
            listener(ids)

    @cached_property
    def listeners(self) -> list[Callable[[Tensor], None]]:
        """Methods `prefetch` of the columns that have one; see `Rows`."""
        columns = pytree.list_leaves(self.data) if is_column_tree(self.data) else []
        return [column.prefetch for column in columns if hasattr(column, "prefetch")]

    @cached_property
    def _reader(self) -> Callable[[Tensor], Any]:
        return make_reader(self.data, raw=self.is_listed or self.transform is not None)

    def _make_keys(self, step: int, ids: Tensor) -> list[ExampleKey]:
        """Make a key for each visit of an example; it does not depend on the batch."""
        order, visits = self.order, getattr(self.order, "visits", None)
        epochs = [order.epoch(step)] * len(ids) if visits is None else visits(step)
        if visits is not None and self.share is not None:
            epochs = epochs[self.share(len(epochs))]
        return [ExampleKey(order.seed, e, i) for e, i in zip(epochs, ids.tolist(), strict=True)]


def _check_workers(workers: Any, data: Any) -> None:
    if workers != 0 and not is_count(workers):
        raise DataError(
            f"workers is {workers!r}. It must be a number of processes from 0 on: 0 reads between "
            f"the updates, 2 are enough if reading takes no longer than the update."
        )
    leaves = pytree.list_leaves(data) if workers and is_column_tree(data) else []
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} - {"cpu"}
    if devices:
        raise DataError(
            f"the data are on {devices.pop()!r} and workers = {workers}. A worker process cannot "
            f"read from the accelerator. Use workers=0, or move the data to the CPU."
        )
