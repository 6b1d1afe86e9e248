"""Cost of an all-reduce: closed forms, and a simulator that plays the same messages.

A message of b bytes takes alpha + b beta seconds. Adding takes gamma seconds a byte. A rank sends
one message at a time and receives one at a time. With W ranks and n bytes on each:

    ring      2 (W-1) alpha    + 2 n (W-1)/W beta     + n (W-1)/W gamma
    halving   2 log2(W) alpha  + 2 n (W-1)/W beta     + n (W-1)/W gamma       W a power of two
    exact     2 (W-1) alpha    + (k+1) n (W-1)/W beta + n (kW-1)/W gamma      k nodes on each rank

`exact` is `anybatch.gradient.pairwise_sum.sum_over_ranks`: all_to_all of slices, their sum in the
order of the tree, and all_gather. `halving` halves the vectors and doubles the distances 1, 2, 4,
... It adds the sums of neighbouring ranges of ranks, as the tree does. Ranks above a power of two
first add theirs to others, and receive the sum at the end. `levels` is `exact` within machines, and
then between them.

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
    "Round",
    "Timing",
    "compare_busiest",
    "count_nodes",
    "exact",
    "exact_rounds",
    "fit_link",
    "halving",
    "halving_rounds",
    "in_buckets",
    "levels",
    "levels_rounds",
    "play",
    "power_below",
    "ring",
    "ring_rounds",
]

Ints = NDArray[Any]
Floats = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Link:
    """Cost of a message."""

    alpha: float  # seconds a message
    beta: float  # seconds a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Machines with the same number of ranks, and a link from each rank to each other."""

    near: Link  # within a machine
    far: Link  # between machines
    machine: int  # ranks
    gamma: float  # seconds a byte added


def ring(ranks: int, num_bytes: float, link: Link, gamma: float) -> float:
    """Return seconds: each slice goes round twice, first to be summed, then to be copied."""
    part = num_bytes * (ranks - 1) / ranks
    return 2 * (ranks - 1) * link.alpha + 2 * part * link.beta + part * gamma


def halving(ranks: int, num_bytes: float, link: Link, gamma: float) -> float:
    """Return seconds: exchange and add half, a quarter, ... of the bytes, then copy them back."""
    inner = power_below(ranks)
    part = num_bytes * (inner - 1) / inner
    steps = inner.bit_length() - 1
    seconds = 2 * steps * link.alpha + 2 * part * link.beta + part * gamma
    if inner < ranks:
        seconds += 2 * link.alpha + 2 * num_bytes * link.beta + num_bytes * gamma
    return seconds


def exact(ranks: int, num_bytes: float, link: Link, gamma: float, nodes: int = 1) -> float:
    """Return seconds: a slice of each node to each rank, and the slices of the sum to all."""
    bytes_out = (nodes + 1) * num_bytes * (ranks - 1) / ranks
    bytes_added = num_bytes * (nodes * ranks - 1) / ranks
    return 2 * (ranks - 1) * link.alpha + bytes_out * link.beta + bytes_added * gamma


def levels(ranks: int, num_bytes: float, network: Network) -> float:
    """Return seconds: exact over the ranks of each machine, and the slices over the machines."""
    inner = min(ranks, network.machine)
    outer = exact(ranks // inner, num_bytes / inner, network.far, network.gamma)
    return exact(inner, num_bytes, network.near, network.gamma) + outer


def in_buckets(bucket: float, num_bytes: float, seconds: float, rest: float) -> float:
    """Return the seconds of all buckets, one after the other.

    Args:
        seconds: of a full bucket.
        rest: of the last bucket, if it is not full.
    """
    count, remainder = divmod(num_bytes, bucket)
    return count * seconds + (rest if remainder else 0.0)


def power_below(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def count_nodes(grains: int, ranks: int) -> list[int]:
    """Return the number of nodes on each rank, for equal shares of consecutive grains."""
    cuts = [rank * grains // ranks for rank in range(ranks + 1)]
    return [len(list_nodes(run)) for run in pairwise(cuts)]


def compare_busiest(nodes: Sequence[int]) -> float:
    """Return the slices through the busiest port in an exact all-reduce, over those in a ring."""
    ranks, total = len(nodes), sum(nodes)
    if ranks == 1:
        return 1.0
    most = max(max(count * (ranks - 1), total - count) for count in nodes) / ranks
    return float((most + (ranks - 1) / ranks) / (2 * (ranks - 1) / ranks))


def fit_link(ranks: int, times: Sequence[tuple[float, float]], gamma: float) -> Link:
    """Fit a link to the seconds of a ring, or of exact with one node a rank.

    Least squares of the relative errors.

    Args:
        times: bytes and seconds.
    """
    messages, part = 2 * (ranks - 1), (ranks - 1) / ranks
    rows = np.array([[messages / s, 2 * part * n / s] for n, s in times])
    target = np.array([1 - part * n * gamma / s for n, s in times])
    alpha, beta = np.linalg.lstsq(rows, target, rcond=None)[0]
    return Link(float(alpha), float(beta))


class Round(NamedTuple):
    """Round of messages, at most one from each rank and one to each rank; arrays [W]."""

    to: Ints  # rank that receives; -1: no message
    first: Ints  # first slice of the message
    count: Ints  # number of slices, consecutive
    adds: bool  # add to the receiver's slices, or replace them


def ring_rounds(ranks: int) -> Iterator[Round]:
    """Yield the rounds of a ring: W slices, each passed on to the next rank."""
    rank, one = np.arange(ranks), np.ones(ranks, int)
    to = (rank + 1) % ranks
    for step in range(ranks - 1):
        yield Round(to, (rank - step) % ranks, one, True)
    for step in range(ranks - 1):
        yield Round(to, (rank + 1 - step) % ranks, one, False)


def exact_rounds(ranks: int) -> Iterator[Round]:
    """Yield the rounds of exact: at each step, each rank sends one slice to the next rank over."""
    rank, one = np.arange(ranks), np.ones(ranks, int)
    for step in range(1, ranks):
        to = (rank + step) % ranks
        yield Round(to, to, one, True)
    for step in range(1, ranks):
        yield Round((rank + step) % ranks, rank, one, False)


def halving_rounds(ranks: int) -> Iterator[Round]:
    """Yield the rounds of halving, with as many slices as the power of two below W."""
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
    """Yield the rounds of two levels; slice i M + m belongs to rank i of machine m of M.

    W is a multiple of the ranks of a machine.
    """
    inner = min(ranks, machine)
    outer, rank = ranks // inner, np.arange(ranks)
    at, place = rank // inner, rank % inner
    one, all_ = np.ones(ranks, int), np.full(ranks, outer)
    for step in range(1, inner):
        other = (place + step) % inner
        yield Round(at * inner + other, other * outer, all_, True)
    for step in range(1, outer):
        other = (at + step) % outer
        yield Round(other * inner + place, place * outer + other, one, True)
    for step in range(1, outer):
        yield Round((at + step) % outer * inner + place, place * outer + at, one, False)
    for step in range(1, inner):
        yield Round(at * inner + (place + step) % inner, place * outer, all_, False)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, messages and slices of an all-reduce, for each size of a slice."""

    seconds: Floats  # [sizes], until the last rank ends
    messages: Ints  # [W], sent by each rank
    slices: Ints  # [W], sent by each rank, over all nodes


def play(
    rounds: Iterator[Round],
    ranks: int,
    slice_bytes: Sequence[float],
    network: Network,
    nodes: Sequence[int] | None = None,
) -> Timing:
    """Play the messages: each begins when both of its ranks have ended their last round.

    Args:
        slice_bytes: sizes of a slice; each is played separately.
        nodes: on each rank, all sent in rounds that add; None: one on each.
    """
    size = np.array(slice_bytes, float)[:, None]
    pieces = np.ones(ranks, int) if nodes is None else np.array(nodes)
    clock = size * network.gamma * np.maximum(pieces - 1, 0)
    messages, slices = np.zeros(ranks, int), np.zeros(ranks, int)
    for to, _, count, adds in rounds:
        sender = np.flatnonzero(to >= 0)
        goal = to[sender]
        num_slices = count[sender] * (pieces[sender] if adds else 1)
        is_near = sender // network.machine == goal // network.machine
        alpha = np.where(is_near, network.near.alpha, network.far.alpha)
        beta = np.where(is_near, network.near.beta, network.far.beta)
        start = np.maximum(clock[:, sender], clock[:, goal])
        end = start + alpha + size * (num_slices * beta)
        after = clock.copy()
        after[:, sender] = np.maximum(after[:, sender], end)
        after[:, goal] = np.maximum(after[:, goal], end)  # at most one message to each
        if adds:
            after[:, goal] += size * (num_slices * network.gamma)
        clock = after
        messages[sender] += 1
        slices[sender] += num_slices
    return Timing(clock.max(1), messages, slices)
