"""What an all-reduce costs: closed forms, and a simulator that plays the messages they count.

A message of b bytes takes alpha + b beta, and what comes is added at gamma seconds a byte. A rank
sends one message at a time and receives one at a time. W ranks, n bytes on each:

    ring      2 (W-1) alpha    + 2 n (W-1)/W beta     + n (W-1)/W gamma
    halving   2 log2(W) alpha  + 2 n (W-1)/W beta     + n (W-1)/W gamma       W a power of two
    exact     2 (W-1) alpha    + (k+1) n (W-1)/W beta + n (kW-1)/W gamma      k nodes on each rank

`exact` is `sum_over_ranks` of `anybatch.gradient.pairwise_sum`: all_to_all of slices, their sum in
the order of the tree, and all_gather. `halving` (vectors halved, distances 1, 2, 4, ... doubled)
adds the sums of neighbouring runs of ranks, as the tree does; what is over a power of two is first
added to others, and told at the end. `levels` is `exact` within machines, and then between them.

Sources: Thakur, Rabenseifner and Gropp 2005, Optimization of collective communication operations
in MPICH (alpha, beta, gamma; ring; halving); anybatch.gradient.pairwise_sum (exact).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anybatch.gradient.pairwise_sum import list_nodes

__all__ = [
    "Link",
    "Network",
    "Played",
    "Round",
    "busiest",
    "exact",
    "exact_rounds",
    "fitted",
    "halving",
    "halving_rounds",
    "in_buckets",
    "levels",
    "levels_rounds",
    "nodes_by_rank",
    "played",
    "power_below",
    "ring",
    "ring_rounds",
]

Ints = NDArray[Any]
Floats = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Link:
    """What a message costs."""

    alpha: float  # seconds a message
    beta: float  # seconds a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Machines of as many ranks each, one link of each kind from any rank to any other."""

    near: Link  # within a machine
    far: Link  # between machines
    machine: int  # ranks
    gamma: float  # seconds a byte added


def ring(ranks: int, num_bytes: float, link: Link, gamma: float) -> float:
    """Seconds: each slice goes round twice, once summed and once told."""
    part = num_bytes * (ranks - 1) / ranks
    return 2 * (ranks - 1) * link.alpha + 2 * part * link.beta + part * gamma


def halving(ranks: int, num_bytes: float, link: Link, gamma: float) -> float:
    """Seconds: half, a quarter, ... of the bytes are exchanged and added, then told backwards."""
    inner = power_below(ranks)
    part = num_bytes * (inner - 1) / inner
    steps = inner.bit_length() - 1
    seconds = 2 * steps * link.alpha + 2 * part * link.beta + part * gamma
    if inner < ranks:
        seconds += 2 * link.alpha + 2 * num_bytes * link.beta + num_bytes * gamma
    return seconds


def exact(ranks: int, num_bytes: float, link: Link, gamma: float, nodes: int = 1) -> float:
    """Seconds: a slice of each node to each rank, and the slices of the sum to all."""
    sent = (nodes + 1) * num_bytes * (ranks - 1) / ranks
    added = num_bytes * (nodes * ranks - 1) / ranks
    return 2 * (ranks - 1) * link.alpha + sent * link.beta + added * gamma


def levels(ranks: int, num_bytes: float, network: Network) -> float:
    """Seconds: exact over the ranks of each machine, and the slices over the machines."""
    inner = min(ranks, network.machine)
    outer = exact(ranks // inner, num_bytes / inner, network.far, network.gamma)
    return exact(inner, num_bytes, network.near, network.gamma) + outer


def in_buckets(bucket: float, num_bytes: float, seconds: float, rest: float) -> float:
    """Seconds of all buckets, one after the other.

    Args:
        seconds: of a whole bucket.
        rest: of what is left over, if any.
    """
    whole, left = divmod(num_bytes, bucket)
    return whole * seconds + (rest if left else 0.0)


def power_below(number: int) -> int:
    """The largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def nodes_by_rank(grains: int, ranks: int) -> list[int]:
    """How many nodes each rank holds: its run of grains is that of `training.shares`."""
    cuts = [rank * grains // ranks for rank in range(ranks + 1)]
    return [len(list_nodes(run)) for run in pairwise(cuts)]


def busiest(nodes: Sequence[int]) -> float:
    """What the busiest port passes in an exact all-reduce, over what it does in a ring."""
    ranks, total = len(nodes), sum(nodes)
    if ranks == 1:
        return 1.0
    spread = max(max(own * (ranks - 1), total - own) for own in nodes) / ranks
    return float((spread + (ranks - 1) / ranks) / (2 * (ranks - 1) / ranks))


def fitted(ranks: int, times: Sequence[tuple[float, float]], gamma: float) -> Link:
    """The link that a ring's seconds come from, or those of exact with one node a rank.

    Args:
        times: bytes and seconds; the squares of the relative errors are the least.
    """
    messages, part = 2 * (ranks - 1), (ranks - 1) / ranks
    rows = np.array([[messages / s, 2 * part * n / s] for n, s in times])
    wanted = np.array([1 - part * n * gamma / s for n, s in times])
    alpha, beta = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return Link(float(alpha), float(beta))


class Round(NamedTuple):
    """One message at most from each rank, and to each: all [W]."""

    to: Ints  # the rank to which each sends; -1: none
    first: Ints  # of the slices that it sends
    count: Ints  # how many, one after the other
    adds: bool  # whether they are added there, or put in their place


def ring_rounds(ranks: int) -> Iterator[Round]:
    """W slices, each handed on to the next rank."""
    rank, one = np.arange(ranks), np.ones(ranks, int)
    to = (rank + 1) % ranks
    for step in range(ranks - 1):
        yield Round(to, (rank - step) % ranks, one, True)
    for step in range(ranks - 1):
        yield Round(to, (rank + 1 - step) % ranks, one, False)


def exact_rounds(ranks: int) -> Iterator[Round]:
    """W slices, that of each rank to it; at each step to one further on."""
    rank, one = np.arange(ranks), np.ones(ranks, int)
    for step in range(1, ranks):
        to = (rank + step) % ranks
        yield Round(to, to, one, True)
    for step in range(1, ranks):
        yield Round((rank + step) % ranks, rank, one, False)


def halving_rounds(ranks: int) -> Iterator[Round]:
    """As many slices as the power of two below W."""
    inner, rank = power_below(ranks), np.arange(ranks)
    extra, is_inner = rank >= inner, rank < inner
    all_ = np.full(ranks, inner)
    if inner < ranks:
        yield Round(np.where(extra, rank - inner, -1), 0 * rank, all_, True)
    first, size, done = 0 * rank, inner, []
    for distance in (1 << i for i in range(inner.bit_length() - 1)):
        size //= 2
        is_upper = (rank & distance) > 0
        to = np.where(is_inner, rank ^ distance, -1)
        yield Round(to, first + np.where(is_upper, 0, size), np.full(ranks, size), True)
        first = first + np.where(is_upper, size, 0)
        done.append((to, first, size))
    for to, first, size in reversed(done):
        yield Round(to, first, np.full(ranks, size), False)
    if inner < ranks:
        yield Round(np.where(rank + inner < ranks, rank + inner, -1), 0 * rank, all_, False)


def levels_rounds(ranks: int, machine: int) -> Iterator[Round]:
    """W slices; slice i M + m is that of rank i of machine m of M. W is a multiple of a machine."""
    inner = min(ranks, machine)
    outer, rank = ranks // inner, np.arange(ranks)
    at, own = rank // inner, rank % inner
    one, all_ = np.ones(ranks, int), np.full(ranks, outer)
    for step in range(1, inner):
        other = (own + step) % inner
        yield Round(at * inner + other, other * outer, all_, True)
    for step in range(1, outer):
        other = (at + step) % outer
        yield Round(other * inner + own, own * outer + other, one, True)
    for step in range(1, outer):
        yield Round((at + step) % outer * inner + own, own * outer + at, one, False)
    for step in range(1, inner):
        yield Round(at * inner + (own + step) % inner, own * outer, all_, False)


@dataclass(frozen=True, slots=True)
class Played:
    """What an all-reduce has come to, for each size of a slice."""

    seconds: Floats  # [sizes], until the last rank has ended
    messages: Ints  # [W], sent by each rank
    slices: Ints  # [W], sent by each rank, those of every node counted


def played(
    rounds: Iterator[Round],
    ranks: int,
    slice_bytes: Sequence[float],
    network: Network,
    nodes: Sequence[int] | None = None,
) -> Played:
    """Play the messages: one begins when both ranks have ended their rounds before.

    Args:
        slice_bytes: sizes of a slice, each a play of its own.
        nodes: of each rank, all of which are sent where they are added; None: one each.
    """
    size = np.array(slice_bytes, float)[:, None]
    pieces = np.ones(ranks, int) if nodes is None else np.array(nodes)
    clock = size * network.gamma * np.maximum(pieces - 1, 0)
    messages, slices = np.zeros(ranks, int), np.zeros(ranks, int)
    for to, _, count, adds in rounds:
        sender = np.flatnonzero(to >= 0)
        goal = to[sender]
        sent = count[sender] * (pieces[sender] if adds else 1)
        is_near = sender // network.machine == goal // network.machine
        alpha = np.where(is_near, network.near.alpha, network.far.alpha)
        beta = np.where(is_near, network.near.beta, network.far.beta)
        begun = np.maximum(clock[:, sender], clock[:, goal])
        ended = begun + alpha + size * (sent * beta)
        after = clock.copy()
        after[:, sender] = np.maximum(after[:, sender], ended)
        after[:, goal] = np.maximum(after[:, goal], ended)  # at most one message to each
        if adds:
            after[:, goal] += size * (sent * network.gamma)
        clock = after
        messages[sender] += 1
        slices[sender] += sent
    return Played(clock.max(1), messages, slices)
