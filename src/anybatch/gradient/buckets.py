"""Sum over ranks, a bucket at a time, while the last backward pass still runs.

    G[b] = combine(nodes of all ranks)[b],    b a bucket: consecutive tensors, from the last one on

A rank's nodes (see `pairwise_sum`) are final for a parameter once its last grain has left its
gradient. The gradients that come first in a backward pass belong to the last layers of the model:

    backward of the last grain    ---- b0 ---- b1 ---- b2 |
    nodes, a slice to each rank        b0 >    b1 >    b2 >|
    errors agreed upon                                     |--|
    sums of slices, to all                                    | b0 b1 b2 >

Every rank sends every bucket, in this order, before it reports whether its pass has failed. After
a failure it sends zeros. No rank waits before it has sent everything that comes earlier, so no
rank waits forever. The bytes in flight are at most those of one gradient.

A gradient may arrive in portions, some of them after its bucket was sent. This is detected: the
update is computed again, and for that model nothing is sent before a pass has ended.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup, Transfer

__all__ = ["Buckets", "cut_buckets", "watch_gradients"]

_MESSAGE_BYTES = 2**20
"""Minimum bytes of a bucket per rank; below this, latency dominates."""

_NUM_BUCKETS = 8
"""Number of buckets of a large gradient. Only the time of the last one is not hidden."""


class _Message(NamedTuple):
    num_bytes: int
    coming: Transfer  # [nodes of all ranks, this rank's slice]


@final
class Buckets:
    """Function of the nodes of all ranks, taken element by element.

    Args:
        like: tensors of the shapes and types of a node.
        counts: number of nodes of each rank, in order.
        combine: takes one tensor [m] for each node, in order, and returns one [m]. The value of an
            element must not depend on m.
        max_bytes: maximum bytes of a bucket.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        counts: Sequence[int],
        combine: Callable[[Sequence[Tensor]], Tensor],
        group: ProcessGroup,
        *,
        max_bytes: int,
    ) -> None:
        self._like, self._counts, self._combine, self._group = like, counts, combine, group
        ranks, total = len(counts), sum(t.nbytes for t in like)
        limit = min(max_bytes, max(total // _NUM_BUCKETS, ranks * _MESSAGE_BYTES))
        self._buckets = cut_buckets(like, limit)
        self._max_in_flight = total * ranks // max(sum(counts), 1)  # receives one gradient's bytes
        self._next = 0
        self._in_flight: deque[_Message] = deque()
        self._slices: list[Tensor] = []

    @property
    def due(self) -> list[int]:
        """Indices of the tensors to send next; empty once all are sent."""
        return self._buckets[self._next] if self._next < len(self._buckets) else []

    def has_room(self) -> bool:
        """Return whether the next bucket can be sent without waiting for another."""
        while self._in_flight and self._in_flight[0].coming.is_complete:
            self._receive()
        num_bytes = sum(message.num_bytes for message in self._in_flight)
        return not self._in_flight or num_bytes + self._num_bytes(self.due) <= self._max_in_flight

    def send(self, nodes: Sequence[Sequence[Tensor]]) -> None:
        """Send the next bucket.

        Args:
            nodes: the tensors that are due, for each of this rank's nodes.
        """
        rows = self._empty_rows()
        for row, node in zip(rows, nodes, strict=True):
            torch.cat([tensor.reshape(-1) for tensor in node], out=row)
        self._send(rows)

    def send_zeros(self) -> None:
        """Send zeros for every bucket that is left."""
        while self.due:
            self._send(self._empty_rows().zero_())

    def wait(self) -> None:
        """Wait for everything in flight, and combine it."""
        while self._in_flight:
            self._receive()

    def gather(self) -> list[Tensor]:
        """Gather the combined tensors on every rank, with the same bits; once, at the end."""
        tensors = list(self._like)
        coming = [distributed.start_all_gather(piece, self._group) for piece in self._slices]
        self._slices = []
        for bucket, message in zip(self._buckets, coming, strict=True):
            flat, sizes = message.wait(), [self._like[i].numel() for i in bucket]
            for i, piece in zip(bucket, torch.split(flat[: sum(sizes)], sizes), strict=True):
                tensors[i] = piece.view_as(self._like[i])
        return tensors

    def _empty_rows(self) -> Tensor:
        """Allocate one row for each of this rank's nodes, of the size of the next bucket."""
        size = sum(self._like[i].numel() for i in self.due)
        num_nodes = self._counts[distributed.get_rank(self._group)]
        return self._like[self.due[0]].new_empty(num_nodes, size)

    def _send(self, rows: Tensor) -> None:
        while not self.has_room():
            self._receive()
        coming = distributed.start_all_to_all(rows, self._counts, self._group)
        self._in_flight.append(_Message(self._num_bytes(self.due), coming))
        self._next += 1

    def _receive(self) -> None:
        """Combine the oldest message, and free the rows that it arrived in."""
        rows = self._in_flight.popleft().coming.wait()
        self._slices.append(self._combine(rows.unbind()).clone())

    def _num_bytes(self, bucket: Iterable[int]) -> int:
        return sum(self._like[i].nbytes for i in bucket)


def cut_buckets(like: Sequence[Tensor], max_bytes: int) -> list[list[int]]:
    """Group consecutive tensors of one type, from the last on, up to a number of bytes."""
    buckets: list[list[int]] = []
    num_bytes = 0
    for i in reversed(range(len(like))):
        num_bytes += like[i].nbytes
        if not buckets or num_bytes > max_bytes or like[i].dtype != like[buckets[-1][0]].dtype:
            buckets.append([])
            num_bytes = like[i].nbytes
        buckets[-1].append(i)
    return buckets


@contextmanager
def watch_gradients(
    parameters: Iterable[nn.Parameter], on_arrival: Callable[[int], None]
) -> Iterator[None]:
    """Call a function with the index of each parameter whose gradient a backward pass leaves."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, i=i: on_arrival(i))  # type: ignore[no-untyped-call]
        for i, p in enumerate(parameters)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
