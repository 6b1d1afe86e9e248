"""Sum the grains of a batch pairwise, in a fixed order.

    S(a..b) = S(a..m) + S(m..b),    m = a + the largest power of two under b - a

The shape of this tree depends on the number of grains alone. Micro-batches and ranks add whole
subtrees, so they change no bit of the result.

Grains arrive one after the other. They are stored as nodes, N(f, k) = S(f..f + 2^k) with 2^k
dividing f. Two nodes that are the halves of a third become that third node:

    N(f, k) + N(f + 2^k, k)  ->  N(f, k + 1)    where 2^(k+1) divides f

So n grains take at most log2(n) + 1 nodes if the first grain is 0, and twice as many otherwise.
The nodes of the whole batch, N_1 .. N_q of falling k, are added from the last one:
S = N_1 + (N_2 + (... + N_q)).

Source: Higham 1993, The accuracy of floating point summation (pairwise summation). Its error grows
as log2(n); the error of a running sum grows as n.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

from anybatch._torch import sum_in_place
from anybatch.distributed import ProcessGroup
from anybatch.gradient.buckets import Buckets
from anybatch.layout import GrainRange

__all__ = ["Node", "add_lists", "append_node", "list_nodes", "open_buckets", "sum_nodes"]
__all__ += ["sum_over_ranks"]

BUCKET_BYTES = 2**25
"""Maximum bytes of a bucket. Bits do not depend on it: sums are taken element by element."""

T = TypeVar("T")
Add = Callable[[T, T], T]


@dataclass(frozen=True, slots=True)
class Node(Generic[T]):
    """Sum over 2^level grains, from the first on."""

    first: int
    level: int
    value: T


def append_node(nodes: Sequence[Node[T]], node: Node[T], add: Add[T]) -> list[Node[T]]:
    """Append a node to the nodes of the grains before it, and merge equal halves.

    Args:
        nodes: nodes of the grains just before the new node's, as this function returns them.
        add: adds two values; it may reuse its first argument.
    """
    result = list(nodes)
    while (
        result and result[-1].level == node.level and result[-1].first % 2 ** (node.level + 1) == 0
    ):
        left = result.pop()
        node = Node(left.first, left.level + 1, add(left.value, node.value))
    return [*result, node]


@lru_cache(maxsize=256)
def list_nodes(grains: GrainRange) -> tuple[Node[None], ...]:
    """List the nodes of a range of grains, without their values."""
    nodes: list[Node[None]] = []
    for grain in range(*grains):
        nodes = append_node(nodes, Node(grain, 0, None), lambda left, right: None)
    return tuple(nodes)


def sum_nodes(nodes: Iterable[Node[T]], add: Add[T]) -> T:
    """Sum all grains of a batch, from the nodes of its ranges in order; at least one node."""
    merged: list[Node[T]] = []
    for node in nodes:
        merged = append_node(merged, node, add)
    total = merged[-1].value
    for node in merged[-2::-1]:
        total = add(node.value, total)
    return total


def add_lists(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """Add two lists of tensors, in place of the left one."""
    sum_in_place(left, right)
    return left


def open_buckets(
    ranges: Sequence[GrainRange], like: Sequence[Tensor], group: ProcessGroup
) -> Buckets:
    """Create the buckets that sum the grains of all ranks; see `buckets`.

    Every rank gets one slice of each node from all ranks, adds these up, and passes the result on.
    This takes as many messages as an all-reduce, and as many bytes if each rank holds one node.

    Args:
        ranges: grains of each rank, in order; some may be empty.
        like: tensors of the shapes and types of the sum, on the device of the nodes.
    """
    per_rank = [list_nodes(grains) for grains in ranges]
    nodes = [node for rank_nodes in per_rank for node in rank_nodes]

    def combine(rows: Sequence[Tensor]) -> Tensor:
        pairs = zip(nodes, rows, strict=True)
        return sum_nodes((Node(n.first, n.level, row) for n, row in pairs), Tensor.add_)

    return Buckets(like, list(map(len, per_rank)), combine, group, max_bytes=BUCKET_BYTES)


@torch.no_grad()
def sum_over_ranks(
    nodes: Sequence[Node[list[Tensor]]],
    ranges: Sequence[GrainRange],
    like: Sequence[Tensor],
    group: ProcessGroup | None,
) -> list[Tensor]:
    """Sum the grains of all ranks, once all nodes are complete: the same bits on every rank.

    Args:
        nodes: nodes of this rank's range, each with one tensor for each of `like`. They are
            overwritten.
        ranges, like: as for `open_buckets`.
    """
    if group is None:
        return sum_nodes(nodes, add_lists)
    buckets = open_buckets(ranges, like, group)
    while due := buckets.due:
        buckets.send([[node.value[i] for i in due] for node in nodes])
    buckets.wait()
    return buckets.gather()
