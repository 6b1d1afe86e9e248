"""From data and an order to the batch of each update, and to the share of each rank.

    batch t = data[order.indices(t)],    key = (seed, t)

    share of rank r of W  =  grains  floor(r G / W) .. floor((r + 1) G / W) - 1  of the batch's G

a run of examples, of whole grains where the objective has any: where there are fewer than
ranks, some shares are empty. The grains are those of `layout.grains`.
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
from anybatch.batch import Uncollated, is_count
from anybatch.distributed import ProcessGroup
from anybatch.errors import DataError
from anybatch.examples import count_examples, is_column_tree, make_reader, stack_examples
from anybatch.gradient.arguments import check_arguments
from anybatch.gradient.habits import why_grains
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.randomness import ExampleKey, Key, fold
from anybatch.workers import read_in_workers

__all__ = ["Batch", "Share", "batches", "choose_share", "share_evenly"]

_log = logging.getLogger(__name__)

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
    found, expected = count_examples(data), getattr(order, "num_examples", None)
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
            ahead = read_in_workers(reading.of_step, steps, workers, seed=seed, listed=listed)
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
        return changed if self.listed else stack_examples(changed)

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
        columns = pytree.leaves(self.data) if is_column_tree(self.data) else []
        return [column.soon for column in columns if hasattr(column, "soon")]

    @cached_property
    def _read(self) -> Callable[[Tensor], Any]:
        return make_reader(self.data, raw=self.listed or self.transform is not None)


def _check_workers(workers: Any, data: Any) -> None:
    if workers != 0 and not is_count(workers):
        raise DataError(
            f"workers = {workers!r}, expected a number of processes from 0 on: 0 reads between "
            f"the updates, 2 are enough where reading takes no longer than the update."
        )
    leaves = pytree.leaves(data) if workers and is_column_tree(data) else []
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} - {"cpu"}
    if devices:
        raise DataError(
            f"the data are on {devices.pop()!r} and workers = {workers}, expected data on the CPU: "
            f"a worker process has no access to the accelerator. Take workers=0: rows are gathered "
            f"where the data are."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of every batch, as a function of the number of examples in it."""

    rank: int
    num_ranks: int
    grain: int | None  # examples that stay together; None: the whole batch

    def __call__(self, num_examples: int) -> slice:
        """Where this rank's share of so many examples lies."""
        size = num_examples if self.grain is None else self.grain
        grains, ragged = divmod(num_examples, size)
        if ragged >= min(2, size) or grains == 0:  # a single example joins its neighbour
            grains += 1
        cuts = [(self.rank + i) * grains // self.num_ranks for i in (0, 1)]
        start, stop = (num_examples if cut == grains else cut * size for cut in cuts)
        return slice(start, stop)


def share_evenly(group: ProcessGroup | None) -> Share:
    """This rank's part of things that may be cut anywhere."""
    return Share(rank=distributed.rank_of(group), num_ranks=distributed.num_ranks(group), grain=1)


def choose_share(
    model: nn.Module, objective: Objective, group: ProcessGroup | None, *, bitwise: bool = False
) -> Share | None:
    """This rank's part of every batch; None: all of it.

    Without a grain a batch may be cut anywhere if the model neither draws random numbers nor
    couples examples, and nowhere if it does, or if the bits are to be the same.
    """
    if group is None:
        return None
    told = distributed.everywhere(lambda: why_grains(model, objective.example_losses), group)
    why = next((reason for reason in told if reason is not None), None)
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
