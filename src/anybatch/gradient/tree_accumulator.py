"""Pairwise sum of grains over micro-batches and ranks, in an order that depends on their number.

`pairwise_sum` holds the order. Sums are in at least float32, and rounded once to the parameter's
type. Buckets of parameters are sent while the last backward pass goes on, see `buckets`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import LostRankError, ProcessGroup
from anybatch.gradient import pairwise_sum
from anybatch.gradient.buckets import Buckets, watch_gradients
from anybatch.gradient.pairwise_sum import Node
from anybatch.gradient.passes import Accumulator, find_wide_type, make_zeros, to_wide
from anybatch.gradient.survey import NewFact
from anybatch.layout import GrainRange, MicroBatch

__all__ = ["TreeAccumulator"]


class TreeAccumulator(Accumulator):
    """Pairwise sum of grains, in a fixed order.

    Args:
        ranges: the grains of each rank.
        is_early: whether buckets are sent during the backward pass of the last grain. Autograd
            must then be what fills `.grad`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ranges: Sequence[GrainRange],
        group: ProcessGroup | None = None,
        *,
        is_early: bool = False,
    ) -> None:
        self._ranges, self._is_early = ranges, is_early
        self._range = ranges[distributed.get_rank(group)]
        self._items = list(parameters.items())
        self._like = [
            p.new_empty((), dtype=find_wide_type(p)).expand(p.shape) for p in parameters.values()
        ]
        super().__init__(parameters, group)
        self.clear()

    def clear(self) -> None:
        super().clear()
        self._nodes: list[Node[list[Tensor]]] = []
        self._buckets: Buckets | None = None
        self._next = self._range[0]  # grain
        self._arrived: set[int] = set()  # parameters whose gradient the last grain has left
        self._sent: set[int] = set()  # parameters whose gradient has been sent
        self._in_portions = False

    @contextmanager
    def backward_passes(self) -> Iterator[None]:
        """Surround the backward passes, and send the buckets; see `buckets`.

        Raises:
            NewFact: a gradient continued to arrive after it was sent.
        """
        if self._group is None:
            yield
            return
        buckets = pairwise_sum.open_buckets(self._ranges, self._like, self._group)
        self._buckets = buckets
        parameters = self._parameters.values() if self._is_early else ()
        try:
            with watch_gradients(parameters, self._send_complete):
                yield
            while due := buckets.due:
                buckets.send([node.value for node in self._take_nodes(due)])
            self._nodes = []
        except LostRankError:
            raise
        except Exception:
            self._nodes = []
            buckets.send_zeros()  # other ranks wait for every bucket
            buckets.wait()
            raise
        buckets.wait()
        if self._in_portions:
            raise NewFact("comes_in_portions")

    def add(self, micro_batch: MicroBatch) -> None:
        assert micro_batch.grain is not None
        leaf = Node(micro_batch.grain, 0, [self._take(i) for i in range(len(self._like))])
        self._nodes = pairwise_sum.append_node(self._nodes, leaf, pairwise_sum.add_lists)
        self._next = micro_batch.grain + 1

    def finish(self) -> None:
        pass

    def sum_over_ranks(self) -> None:
        if self._buckets is None:
            group = self._group
            sums = pairwise_sum.sum_over_ranks(self._nodes, self._ranges, self._like, group)
        else:
            sums = self._buckets.gather()
        self.sums = dict(zip(self._parameters, sums, strict=True))
        self._nodes, self._buckets = [], None

    @torch.no_grad()
    def _send_complete(self, i: int) -> None:
        """Send the buckets that parameter i completes, in the backward pass of the last grain."""
        if self._next + 1 != self._range[1]:
            return
        assert self._buckets is not None
        self._arrived.add(i)
        while (due := self._buckets.due) and self._arrived.issuperset(due):
            if not self._buckets.has_room():
                return
            leaf = Node(self._next, 0, [self._take(i) for i in due])
            nodes = pairwise_sum.append_node(self._take_nodes(due), leaf, pairwise_sum.add_lists)
            self._buckets.send([node.value for node in nodes])
            self._sent.update(due)

    def _take(self, i: int) -> Tensor:
        """Move the gradient of parameter i out of `.grad`; empty if it has been sent."""
        name, p = self._items[i]
        gradient, p.grad = p.grad, None
        if i in self._sent:
            self._in_portions |= gradient is not None
            return self._like[i].new_empty(0)
        if gradient is None:
            return make_zeros(p)
        gradient = to_wide(name, gradient)
        return gradient if self._scale == 1 else gradient.mul_(self._scale)

    def _take_nodes(self, bucket: Sequence[int]) -> list[Node[list[Tensor]]]:
        """Move a bucket's tensors out of every node."""
        nodes = [Node(n.first, n.level, [n.value[i] for i in bucket]) for n in self._nodes]
        for node in self._nodes:
            for i in bucket:
                node.value[i] = self._like[i].new_empty(0)
        return nodes
