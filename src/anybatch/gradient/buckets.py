"""The sum over ranks, a bucket at a time, on its way while the last backward pass still runs.

    G[b] = combine(all ranks' nodes)[b],    b a bucket: consecutive tensors, from the last one on

A rank's nodes (see `tree`) are final for a parameter once the last of its grains has left its
gradient, and those that come first in a backward pass come last in the model:

    backward of the last grain    ---- b0 ---- b1 ---- b2 |
    nodes, a slice to each rank        b0 >    b1 >    b2 >|
    errors agreed upon                                     |--|
    sums of slices, to all                                    | b0 b1 b2 >

Every rank sends every bucket, in this order, before it says what has become of its pass: zeros
where that has failed, and at the end what nothing has reached. None waits before it has sent all
that goes before, so that none waits for ever. What is under way is no larger than one gradient.

A gradient that comes in portions, some after the bucket was sent, is found: the update is made
again, and of that model nothing is sent before a pass has ended.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup, Transfer
from anybatch.gradient.attempts import Again

__all__ = ["Buckets", "InPortions", "arrivals", "cut"]

_MESSAGE_BYTES = 2**20
"""Of a bucket to one rank, at least, or its start takes longer than its bytes."""

_NUM_BUCKETS = 8
"""Of a gradient that is large enough: what the last one takes is not hidden."""


class InPortions(Again):
    """A gradient came on after it was sent."""


class _Sent(NamedTuple):
    num_bytes: int
    coming: Transfer  # [nodes of all ranks, this rank's slice]


@final
class Buckets:
    """A function of all ranks' nodes, taken element by element.

    Args:
        like: tensors of the shapes and types of a node's.
        counts: nodes of each rank, in order.
        combine: tensors [m], those of all nodes in order, to one [m]; what it gives for an element
            may not depend on m.
        most: bytes of a bucket.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        counts: Sequence[int],
        combine: Callable[[Sequence[Tensor]], Tensor],
        group: ProcessGroup,
        *,
        most: int,
    ) -> None:
        self._like, self._counts, self._combine, self._group = like, counts, combine, group
        ranks, total = len(counts), sum(t.nbytes for t in like)
        limit = min(most, max(total // _NUM_BUCKETS, ranks * _MESSAGE_BYTES))
        self._cut = cut(like, limit)
        self._room = total * ranks // max(sum(counts), 1)  # of which one gradient's bytes come
        self._next = 0
        self._sent: deque[_Sent] = deque()
        self._slices: list[Tensor] = []

    @property
    def due(self) -> list[int]:
        """The tensors that are to be sent next; none where all have been."""
        return self._cut[self._next] if self._next < len(self._cut) else []

    def has_room(self) -> bool:
        """Whether the next bucket can be sent without waiting for another."""
        while self._sent and self._sent[0].coming.is_complete:
            self._take_in()
        under_way = sum(sent.num_bytes for sent in self._sent)
        return not self._sent or under_way + self._num_bytes(self.due) <= self._room

    def send(self, nodes: Sequence[Sequence[Tensor]]) -> None:
        """Send the next bucket.

        Args:
            nodes: the tensors that are due, of each of this rank's nodes.
        """
        pieces = self._pieces()
        for piece, node in zip(pieces, nodes, strict=True):
            torch.cat([tensor.reshape(-1) for tensor in node], out=piece)
        self._send(pieces)

    def send_zeros(self) -> None:
        """Send in place of all that is left."""
        while self.due:
            self._send(self._pieces().zero_())

    def come(self) -> None:
        """Wait for all that was sent, and combine it."""
        while self._sent:
            self._take_in()

    def told(self) -> list[Tensor]:
        """What has been combined, of each tensor: the same bits on every rank. Once, at the end."""
        found = list(self._like)
        coming = [distributed.start_all_gather(own, self._group) for own in self._slices]
        self._slices = []
        for bucket, one in zip(self._cut, coming, strict=True):
            flat, sizes = one.wait(), [self._like[i].numel() for i in bucket]
            for i, part in zip(bucket, torch.split(flat[: sum(sizes)], sizes), strict=True):
                found[i] = part.view_as(self._like[i])
        return found

    def _pieces(self) -> Tensor:
        size = sum(self._like[i].numel() for i in self.due)
        own = self._counts[distributed.get_rank(self._group)]
        return self._like[self.due[0]].new_empty(own, size)

    def _send(self, pieces: Tensor) -> None:
        while not self.has_room():
            self._take_in()
        coming = distributed.start_all_to_all(pieces, self._counts, self._group)
        self._sent.append(_Sent(self._num_bytes(self.due), coming))
        self._next += 1

    def _take_in(self) -> None:
        rows = self._sent.popleft().coming.wait()
        self._slices.append(self._combine(rows.unbind()).clone())  # the rows can go

    def _num_bytes(self, bucket: Iterable[int]) -> int:
        return sum(self._like[i].nbytes for i in bucket)


def cut(like: Sequence[Tensor], most: int) -> list[list[int]]:
    """Which tensors travel together: consecutive ones of a type, from the last on, up to a number
    of bytes."""
    found: list[list[int]] = []
    num_bytes = 0
    for i in reversed(range(len(like))):
        num_bytes += like[i].nbytes
        if not found or num_bytes > most or like[i].dtype != like[found[-1][0]].dtype:
            found.append([])
            num_bytes = like[i].nbytes
        found[-1].append(i)
    return found


@contextmanager
def arrivals(parameters: Iterable[nn.Parameter], arrived: Callable[[int], None]) -> Iterator[None]:
    """Hear of every gradient that a backward pass leaves: the place of its parameter."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, i=i: arrived(i))  # type: ignore[no-untyped-call]
        for i, p in enumerate(parameters)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
