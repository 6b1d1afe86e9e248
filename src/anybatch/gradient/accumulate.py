"""Sum the micro-batches' gradients in at least float32, rounded once to the parameter's type.

running    one micro-batch after the other; then over ranks, in an order that depends on both
pairwise   the grains in the order of `pairwise_sum`, which depends on their number alone
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch._torch import multiply_in_place
from anybatch.distributed import LostRankError, ProcessGroup
from anybatch.errors import ModelError
from anybatch.gradient import pairwise_sum
from anybatch.gradient.buckets import Buckets, watch_gradients
from anybatch.gradient.pairwise_sum import Node
from anybatch.gradient.survey import NewFact
from anybatch.layout import GrainRange, MicroBatch

__all__ = ["Accumulator", "TreeAccumulator"]


class Accumulator:
    """Running sum of the gradients that backward passes leave in `.grad`.

    During a backward pass the sums are in `.grad`, and autograd adds to them in place. At any
    other time they are stored here: a forward pass is the user's code, which may read `.grad`, or
    fill it by a backward pass of its own.

    Args:
        parameters: those to take gradients of, by name.
        group: the ranks whose sums are added up; None: this process alone.
        is_separate: whether `.grad` must hold one micro-batch's gradient alone after its pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: ProcessGroup | None = None,
        *,
        is_separate: bool = False,
    ) -> None:
        self._parameters, self._group, self._is_separate = parameters, group, is_separate
        self.sums: dict[str, Tensor] = {}
        """By name, in the order of the parameters, once `finish` has been called."""
        self._scale = 1.0

    def clear(self) -> None:
        """Drop all sums."""
        self.sums, self._scale = {}, 1.0
        self.discard()

    def discard(self) -> None:
        """Drop the content of `.grad`, which user code may have filled."""
        for p in self._parameters.values():
            p.grad = None

    def begin(self, scale: float = 1.0) -> None:
        """Prepare for the backward pass of one micro-batch.

        Args:
            scale: factor of its gradient in the sum; a power of two, or the same for all.
        """
        if scale != self._scale and self.sums:  # the sums are multiples of the last scale
            multiply_in_place(list(self.sums.values()), self._scale / scale)
        self._scale = scale
        for name, p in self._parameters.items():
            p.grad = None
            if not self._is_separate and name in self.sums and self.sums[name].dtype == p.dtype:
                p.grad = self.sums.pop(name)

    def backward_passes(self) -> AbstractContextManager[None]:
        """Surround the backward passes of all micro-batches of this rank."""
        return nullcontext()

    def add(self, micro_batch: MicroBatch) -> None:
        """Move a micro-batch's gradient from `.grad` to the sums."""
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            gradient, p.grad = p.grad, None
            if not (gradient.layout == torch.strided and gradient.itemsize >= 4):
                gradient = _to_wide(name, gradient)
            elif gradient.is_conj():  # a lazy conjugate of autograd's has no real parts
                gradient = gradient.resolve_conj()
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    def finish(self) -> None:
        """Complete the sums, with zeros for parameters that no gradient has reached."""
        sums = self.sums
        if self._scale != 1 and sums:
            multiply_in_place(list(sums.values()), self._scale)
        self.sums = {}
        for name, p in self._parameters.items():
            self.sums[name] = sums[name] if name in sums else _make_zeros(p)

    def sum_over_ranks(self) -> None:
        """Add up the sums of all ranks; once, and after `finish`."""
        if self._group is not None:
            distributed.all_reduce_sum(list(self.sums.values()), self._group)

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            p.grad = self.sums[name].to(p.dtype)


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
        self._like = [p.new_empty((), dtype=_wide(p)).expand(p.shape) for p in parameters.values()]
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
            return _make_zeros(p)
        gradient = _to_wide(name, gradient)
        return gradient if self._scale == 1 else gradient.mul_(self._scale)

    def _take_nodes(self, bucket: Sequence[int]) -> list[Node[list[Tensor]]]:
        """Move a bucket's tensors out of every node."""
        nodes = [Node(n.first, n.level, [n.value[i] for i in bucket]) for n in self._nodes]
        for node in self._nodes:
            for i in bucket:
                node.value[i] = self._like[i].new_empty(0)
        return nodes


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _make_zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=_wide(p))


def _to_wide(name: str, gradient: Tensor) -> Tensor:
    """Convert a gradient to at least float32, and refuse a sparse one."""
    if gradient.layout != torch.strided:
        raise ModelError(
            f"The gradient of {name} is sparse. It must be dense: a penalty, a norm and a sum over "
            f"ranks need every element. Use Embedding(..., sparse=False)."
        )
    # Autograd leaves some complex gradients as a lazy conjugate, which has no real parts.
    gradient = gradient.resolve_conj()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
