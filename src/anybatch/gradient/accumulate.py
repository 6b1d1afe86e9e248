"""The sum of the parts' gradients, in at least float32, rounded to the parameter's type once.

running   the parts one after the other; then the ranks, in an order that depends on both
by tree   the grains in the order of `tree`, which nothing but their number changes
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
from anybatch.gradient.attempts import InPortions
from anybatch.gradient.buckets import Buckets, watch_gradients
from anybatch.gradient.pairwise_sum import Node
from anybatch.layout import GrainRange, MicroBatch

__all__ = ["Accumulator", "TreeAccumulator"]


class Accumulator:
    """Sums of what the backward passes of all parts leave in `.grad`.

    During a backward pass autograd adds to the sums in `.grad`, in place. At any other time they
    are kept here: forward passes are the user's code, which may read `.grad`, or fill it by a
    backward pass of its own.

    Args:
        parameters: those to take gradients of, by name.
        group: the ranks whose sums are added up; None: this process alone.
        is_apart: whether each part's gradient is to be alone in `.grad` after its backward pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: ProcessGroup | None = None,
        *,
        is_apart: bool = False,
    ) -> None:
        self._parameters, self._group, self._is_apart = parameters, group, is_apart
        self.sums: dict[str, Tensor] = {}
        """By name, in the order of the parameters, once `finish` has been called."""
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.sums, self._scale = {}, 1.0
        self.discard()

    def discard(self) -> None:
        """Drop what is in `.grad`."""
        for p in self._parameters.values():
            if p.grad is not None:
                p.grad = None

    def begin(self, scale: float = 1.0) -> None:
        """Prepare for the backward pass of one part.

        Args:
            scale: factor of the part's gradient in the sum; a power of two, or the same for all.
        """
        self.discard()
        if scale != self._scale and self.sums:  # the sums are multiples of the last part's scale
            multiply_in_place(list(self.sums.values()), self._scale / scale)
        self._scale = scale
        if self._is_apart:
            return
        for name, p in self._parameters.items():
            if name in self.sums and self.sums[name].dtype == p.dtype:
                p.grad = self.sums.pop(name)

    def going_back(self) -> AbstractContextManager[None]:
        """Around the backward passes of all parts of this rank."""
        return nullcontext()

    def add(self, part: MicroBatch) -> None:
        """Take the part's gradient out of `.grad`, with the sums that it was added to."""
        for name, p in self._parameters.items():
            if p.grad is None:
                continue
            gradient, p.grad = _dense(name, p.grad).to(_wide(p)), None
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    def finish(self) -> None:
        """Complete the sums, with zeros for parameters that nothing has reached."""
        sums = self.sums
        if self._scale != 1 and sums:
            multiply_in_place(list(sums.values()), self._scale)
        self.sums = {
            name: sums[name] if name in sums else _zeros(p) for name, p in self._parameters.items()
        }

    def sum_over_ranks(self) -> None:
        """Add up what all ranks hold; once, and after `finish`."""
        distributed.all_reduce_sum(list(self.sums.values()), self._group)

    def deliver(self) -> None:
        """Leave the sums in `.grad`."""
        for name, p in self._parameters.items():
            p.grad = self.sums[name].to(p.dtype)


class TreeAccumulator(Accumulator):
    """The same, of parts that are grains: every grain is a leaf of the fixed tree."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        runs: Sequence[GrainRange],
        group: ProcessGroup | None = None,
        *,
        is_early: bool = False,
    ) -> None:
        """Take the grains that each rank holds, and whether the last of them is sent as its
        gradients come: those that autograd itself leaves in `.grad`."""
        self._runs, self._is_early = runs, is_early
        self._own = runs[distributed.get_rank(group)]
        self._items = list(parameters.items())
        self._like = [p.new_empty((), dtype=_wide(p)).expand(p.shape) for p in parameters.values()]
        super().__init__(parameters, group)

    def clear(self) -> None:
        super().clear()
        self._nodes: list[Node[list[Tensor]]] = []
        self._buckets: Buckets | None = None
        self._next = self._own[0]  # grain
        self._here: set[int] = set()  # the gradients that the last grain has left
        self._gone: set[int] = set()  # those of them that have been sent
        self._in_portions = False

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """And send what becomes of them, see `buckets`.

        Raises:
            InPortions: a gradient came on after it was sent.
        """
        if self._group is None:
            yield
            return
        buckets = self._buckets = pairwise_sum.open_buckets(self._runs, self._like, self._group)
        parameters = self._parameters.values() if self._is_early else ()
        try:
            with watch_gradients(parameters, self._arrived):
                yield
            while due := buckets.due:
                buckets.send([node.value for node in self._taken_out(due)])
            self._nodes = []
        except LostRankError:
            raise
        except Exception:
            self._nodes = []
            buckets.send_zeros()
            buckets.wait()
            raise
        buckets.wait()
        if self._in_portions:
            raise InPortions

    def add(self, part: MicroBatch) -> None:
        assert part.grain is not None
        leaf = [self._taken(i) for i in range(len(self._like))]
        self._nodes = pairwise_sum.append_node(
            self._nodes, Node(part.grain, 0, leaf), pairwise_sum.add_lists
        )
        self._next = part.grain + 1

    def finish(self) -> None:
        pass

    def sum_over_ranks(self) -> None:
        if self._buckets is None:
            sums = pairwise_sum.sum_over_ranks(self._nodes, self._runs, self._like, self._group)
        else:
            sums = self._buckets.gather()
        self.sums = dict(zip(self._parameters, sums, strict=True))
        self._nodes, self._buckets = [], None

    @torch.no_grad()
    def _arrived(self, i: int) -> None:
        """Send what is complete with this gradient, in the backward pass of the last grain."""
        if self._next + 1 != self._own[1]:
            return
        assert self._buckets is not None
        self._here.add(i)
        while (due := self._buckets.due) and self._here.issuperset(due):
            if not self._buckets.has_room():
                return
            leaf = Node(self._next, 0, [self._taken(i) for i in due])
            nodes = pairwise_sum.append_node(self._taken_out(due), leaf, pairwise_sum.add_lists)
            self._buckets.send([node.value for node in nodes])
            self._gone.update(due)

    def _taken(self, i: int) -> Tensor:
        """What one grain has left in the i-th `.grad`, and it alone; of one sent, nothing."""
        name, p = self._items[i]
        found, p.grad = p.grad, None
        if i in self._gone:
            self._in_portions |= found is not None
            return _none(self._like[i])
        if found is None:
            return _zeros(p)
        gradient = _dense(name, found).to(_wide(p))
        return gradient if self._scale == 1 else gradient.mul_(self._scale)

    def _taken_out(self, bucket: Sequence[int]) -> list[Node[list[Tensor]]]:
        """A bucket's tensors of every node, which keeps none of them."""
        taken = [Node(n.first, n.level, [n.value[i] for i in bucket]) for n in self._nodes]
        for node in self._nodes:
            for i in bucket:
                node.value[i] = _none(self._like[i])
        return taken


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=_wide(p))


def _dense(name: str, gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise ModelError(
            f"the gradient of {name} is sparse, expected a dense one: a penalty, a norm "
            f"and a sum over ranks need every element. Use Embedding(..., sparse=False)."
        )
    return gradient.resolve_conj()  # autograd leaves some as a view, which has no real parts
