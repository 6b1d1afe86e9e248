"""Layout of a batch: how it is cut over micro-batches and ranks.

    batch = shares of the ranks, in order;   share = micro-batches, in order

If the model draws random numbers or couples examples, each micro-batch is one grain. Grains are
cut from the whole batch: [0, g), [g, 2g), ... A last grain of a single example joins its
neighbour, unless g is 1. In a share that comes cut (`MicroBatches`), each piece is cut into grains
by itself; without a grain size it is one grain.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from anybatch.batch import is_count
from anybatch.errors import LayoutError

__all__ = [
    "GrainRange",
    "Layout",
    "MicroBatch",
    "ShareRange",
    "cut_grains",
    "cut_micro_batches",
    "cut_pieces",
    "list_grain_ranges",
]

GrainRange = tuple[int, int]
"""Grains first .. stop-1 of a batch."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Cut of this rank's share: a memory knob, never a hyper-parameter.

    Args:
        micro_batch: examples that pass through the model together; None: all at once;
            "auto": as many as fit; a sequence of sizes: these cuts, in order.
        memory_bytes: bytes that "auto" may use on the CPU; None: half of what is available.
        at_most: size at which "auto" begins, `gradient.micro_batch` of an earlier step;
            None: measure it.

    Example:
        >>> layout = Layout(micro_batch=64)
        >>> [(m.start, m.stop) for m in cut_micro_batches(layout, 150)]
        [(0, 64), (64, 128), (128, 150)]
    """

    micro_batch: int | Literal["auto"] | Sequence[int] | None = None
    memory_bytes: int | None = None
    at_most: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "at_most"):
            limit = getattr(self, name)
            if limit is not None and not is_count(limit):
                raise LayoutError(f"{name} is {limit!r}. It must be None or an integer above 0.")
        micro_batch = self.micro_batch
        if micro_batch is None or (isinstance(micro_batch, str) and micro_batch == "auto"):
            return
        is_sequence = isinstance(micro_batch, Sequence)
        sizes: list[Any] = list(micro_batch) if is_sequence else [micro_batch]  # type: ignore
        if not sizes or not all(map(is_count, sizes)):
            raise LayoutError(
                f"micro_batch is {micro_batch!r}. It must be None, 'auto', a number of examples "
                f"of at least 1, or a sequence of such numbers."
            )
        integers = tuple(map(int, sizes))
        object.__setattr__(self, "micro_batch", integers if is_sequence else integers[0])


class ShareRange(NamedTuple):
    """Position of a share in the batch: examples start .. stop-1 of total."""

    start: int
    stop: int
    total: int
    cuts: tuple[int, ...] = ()  # starts of all ranks' shares, and total; (): one rank has all
    pieces: tuple[int, ...] | None = None  # sizes, over all ranks, if a share comes cut

    @property
    def size(self) -> int:
        """Number of examples of the share."""
        return self.stop - self.start


class MicroBatch(NamedTuple):
    """Examples start .. stop-1 of a share, and the grain that they are, if they are one."""

    start: int
    stop: int
    grain: int | None = None

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.stop - self.start


def cut_pieces(layout: Layout, sizes: Sequence[int]) -> Layout:
    """Return the layout of a share that comes cut: no micro-batch goes beyond a piece.

    Args:
        sizes: of the pieces, in order.

    Raises:
        LayoutError: a layout that does not cut every piece into whole micro-batches.
    """
    micro_batch = layout.micro_batch
    if micro_batch is None or not sizes:
        return Layout(tuple(sizes) or None)
    if isinstance(micro_batch, str):
        raise LayoutError(
            "micro_batch is 'auto', and the share comes as MicroBatches, which are cut already. "
            "Leave the layout out, or pass a number of examples, at which each piece is cut again."
        )
    if isinstance(micro_batch, int):
        cuts = [cut_micro_batches(Layout(micro_batch), size) for size in sizes]
        return Layout(tuple(micro.size for piece in cuts for micro in piece))
    ends, needed = set(accumulate(micro_batch)), set(accumulate(sizes))
    if not needed <= ends or max(ends) > max(needed):
        raise LayoutError(
            f"The micro-batches {list(micro_batch)} go beyond the pieces {list(sizes)} in which "
            f"the share comes. Leave the layout out, or cut each piece by itself."
        )
    return layout


def cut_micro_batches(layout: Layout, num_examples: int) -> list[MicroBatch]:
    """Cut a share whose model neither draws random numbers nor couples examples.

    Raises:
        LayoutError: explicit sizes that do not add up to the share.
    """
    sizes = layout.at_most if layout.micro_batch == "auto" else layout.micro_batch
    if num_examples == 0:
        return []
    if not isinstance(sizes, Sequence):
        step = num_examples if sizes is None else int(sizes)
        starts = range(0, num_examples, step)
        return [MicroBatch(start, min(start + step, num_examples)) for start in starts]
    if sum(sizes) != num_examples:
        raise LayoutError(
            f"The micro-batches {list(sizes)} hold {sum(sizes)} examples, but the share holds "
            f"{num_examples}. Their sum must be the size of the share."
        )
    ends = accumulate(sizes)
    return [MicroBatch(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def cut_grains(
    share: ShareRange, grain: int | None, layout: Layout, reason: str
) -> list[MicroBatch]:
    """Cut a share whose model must run one grain at a time.

    Args:
        grain: examples of a grain; None: the whole batch is one.
        reason: why it must, for the message, such as "fc.dropout draws random numbers".

    Raises:
        LayoutError: a share or a micro-batch that would cut a grain.
    """
    edges = _list_edges(share, grain)
    size = max(b - a for a, b in pairwise(edges)) if grain is None else grain
    advice = (
        "Declare Objective(grain=...), a number of examples that fits in memory: it is part of "
        "the objective, since the examples of a grain share their random numbers and statistics."
        if grain is None
        else "Make shares and micro-batches of whole grains."
    )
    for name, edge in (("starts", share.start), ("ends", share.stop)):
        if edge not in edges:
            raise LayoutError(
                f"{reason}, so the model runs in grains of {size} examples. But a rank's share "
                f"{name} at example {edge} of {share.total}, inside a grain. {advice}"
            )
    # Under "auto" the grain alone decides how many examples run together.
    cuts = [] if layout.micro_batch == "auto" else cut_micro_batches(layout, share.size)
    smallest = min((micro_batch.size for micro_batch in cuts[:-1]), default=size)
    if share.pieces is not None:  # micro-batches of different sizes: none may end inside a grain
        ends = [micro_batch for micro_batch in cuts if share.start + micro_batch.stop not in edges]
        smallest = min((micro_batch.size for micro_batch in ends), default=size)
    if len(cuts) > 1 and smallest < size:
        raise LayoutError(
            f"{reason}, so the model runs in grains of {size} examples. But a micro-batch holds "
            f"{smallest}. {advice}"
        )
    return [
        MicroBatch(start - share.start, stop - share.start, index)
        for index, (start, stop) in enumerate(pairwise(edges))
        if share.start <= start and stop <= share.stop
    ]


def list_grain_ranges(share: ShareRange, grain: int | None) -> list[GrainRange]:
    """List the grains of each rank's share, if all shares are whole grains."""
    edges = _list_edges(share, grain)
    cuts = [bisect_left(edges, cut) for cut in share.cuts or (0, share.total)]
    return list(pairwise(cuts))


def _list_edges(share: ShareRange, grain: int | None) -> list[int]:
    """List where the grains of a batch begin, and where the last one ends."""
    edges = [0]
    for piece in share.pieces or (share.total,):
        size, first, stop = grain or piece, edges[-1], edges[-1] + piece
        edges += [*range(first + size, stop, size), stop]
        if edges[-1] - edges[-2] < min(2, size) and edges[-2] > first:
            del edges[-2]
    return edges
