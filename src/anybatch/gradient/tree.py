"""Fixed pairwise summation of what the grains of a batch leave.

    S(a..b) = S(a..m) + S(m..b),    m = a + the largest power of two under b - a

The shape of the tree depends on the number of grains alone, so micro-batches and ranks that add
whole subtrees change no bit of the result.

Streamed, a run of grains is held as nodes, N(f, k) = S(f..f + 2^k) with 2^k dividing f, and two
that are the halves of a third become that one as soon as both are there:

    N(f, k) + N(f + 2^k, k)  ->  N(f, k + 1)    where 2^(k+1) divides f

What stays are the largest aligned subtrees of the run: at most log2(n) + 1 at any time where the
n grains begin at 0, and twice as many elsewhere. Those of the whole batch, N_1 .. N_q of falling
k, are added up from the last: S = N_1 + (N_2 + (... + N_q)).

Source: Higham 1993, The accuracy of floating point summation (pairwise summation): its error grows
as log2(n), that of a running sum as n.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from anybatch.distributed import ProcessGroup
from anybatch.gradient.buckets import Buckets

__all__ = [
    "Node",
    "Run",
    "add",
    "appended",
    "nodes_of",
    "over_ranks",
    "summed",
    "summed_over_ranks",
]

BUCKET_BYTES = 2**25
"""What travels at once, at most. Bits do not depend on it: sums are taken element by element."""

T = TypeVar("T")
Add = Callable[[T, T], T]
Run = tuple[int, int]  # grains first .. stop - 1, which one rank holds


@dataclass(frozen=True, slots=True)
class Node(Generic[T]):
    """The sum over 2^level grains from the first on."""

    first: int
    level: int
    value: T


def appended(nodes: Sequence[Node[T]], node: Node[T], add: Add[T]) -> list[Node[T]]:
    """The nodes of a run with one more at its end.

    Args:
        nodes: of the grains just before the node's, as this function has left them.
        add: may reuse its first argument.
    """
    kept = list(nodes)
    while kept and kept[-1].level == node.level and kept[-1].first % 2 ** (node.level + 1) == 0:
        left = kept.pop()
        node = Node(left.first, left.level + 1, add(left.value, node.value))
    return [*kept, node]


@lru_cache(maxsize=256)
def nodes_of(run: Run) -> tuple[Node[None], ...]:
    """The nodes that a run of grains comes to, without their values."""
    nodes: list[Node[None]] = []
    for grain in range(*run):
        nodes = appended(nodes, Node(grain, 0, None), lambda left, right: None)
    return tuple(nodes)


def summed(nodes: Iterable[Node[T]], add: Add[T]) -> T:
    """S over all grains of a batch, from the nodes of its runs in order; at least one."""
    kept: list[Node[T]] = []
    for node in nodes:
        kept = appended(kept, node, add)
    total = kept[-1].value
    for node in kept[-2::-1]:
        total = add(node.value, total)
    return total


def add(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Lists of tensors, in the place of the left one."""
    torch._foreach_add_(left, right)
    return left


def over_ranks(runs: Sequence[Run], like: Sequence[Tensor], group: ProcessGroup) -> Buckets:
    """S over all grains of a batch whose runs lie on several ranks, in buckets; see `buckets`.

    Every rank gets one slice of each node from all, adds these up, and passes the result on: as
    many messages as an all-reduce, and as many bytes where each rank holds one node.

    Args:
        runs: of all ranks, in order; some may be empty.
        like: tensors of the shapes and types that the sum has, on the device of the nodes'.
    """
    held = [nodes_of(run) for run in runs]
    shape = [node for rank in held for node in rank]

    def combine(rows: Sequence[Tensor]) -> Tensor:
        placed = zip(shape, rows, strict=True)
        return summed((Node(n.first, n.level, row) for n, row in placed), Tensor.add_)

    return Buckets(like, list(map(len, held)), combine, group, most=BUCKET_BYTES)


@torch.no_grad()
def summed_over_ranks(
    nodes: Sequence[Node[list[Tensor]]],
    runs: Sequence[Run],
    like: Sequence[Tensor],
    group: ProcessGroup | None,
) -> list[Tensor]:
    """S over all grains of a batch, from nodes that are all there: the same bits on every rank.

    Args:
        nodes: of this rank's run, each with a tensor for each of `like`; they are used up.
        runs, like: as for `over_ranks`.
    """
    if group is None:
        return summed(nodes, add)
    buckets = over_ranks(runs, like, group)
    while due := buckets.due:
        buckets.send([[node.value[i] for i in due] for node in nodes])
    buckets.come()
    return buckets.told()
