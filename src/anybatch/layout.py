"""How a batch is cut over micro-batches and ranks, and into the parts that run together.

    batch = shares of the ranks, in order;   share = parts, in order

A part is a micro-batch, or one grain where the model draws random numbers or couples
examples. Grains are cut from the whole batch: [0, g), [g, 2g), ..., and a last one
of a single example joins its neighbour, unless g is 1.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from anybatch.batch import is_count
from anybatch.errors import LayoutError

__all__ = ["Layout", "Part", "Place", "grains", "micro_batches", "runs"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How this rank's share is cut: a memory knob, never a hyper-parameter.

    Args:
        micro_batch: examples that pass through the model together; None: all at once;
            "auto": as many as fit; a sequence of sizes: these cuts, in order.
        memory_bytes: what "auto" may use on the CPU; None: half of what is available.
        at_most: the size at which "auto" begins, `gradient.micro_batch` of an earlier step;
            None: find out.
    """

    micro_batch: int | Literal["auto"] | Sequence[int] | None = None
    memory_bytes: int | None = None
    at_most: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "at_most"):
            limit = getattr(self, name)
            if limit is not None and not is_count(limit):
                raise LayoutError(f"{name} is {limit!r}. It must be None or an integer above 0.")
        given = self.micro_batch
        if given is None or (isinstance(given, str) and given == "auto"):
            return
        sizes: list[Any] = list(given) if isinstance(given, Sequence) else [given]
        if not sizes or not all(map(is_count, sizes)):
            raise LayoutError(
                f"expected micro_batch to be None, 'auto', a number of examples of at least 1, "
                f"or a sequence of such numbers, got {given!r}."
            )
        plain = tuple(map(int, sizes))
        object.__setattr__(self, "micro_batch", plain if isinstance(given, Sequence) else plain[0])


class Place(NamedTuple):
    """Where a share lies in the batch: examples start .. stop-1 of total."""

    start: int
    stop: int
    total: int
    cuts: tuple[int, ...] = ()  # where the shares of all ranks begin, and total; (): one has all

    @property
    def is_whole(self) -> bool:
        """Whether this share is the batch."""
        return self.stop - self.start == self.total


class Part(NamedTuple):
    """Examples start .. stop-1 of a share, and the grain that they are, if one."""

    start: int
    stop: int
    grain: int | None = None


def micro_batches(layout: Layout, num_examples: int) -> list[Part]:
    """The parts of a share whose model neither draws nor couples.

    Raises:
        LayoutError: explicit sizes that do not add up to the share.
    """
    given = layout.at_most if layout.micro_batch == "auto" else layout.micro_batch
    if num_examples == 0:
        return []
    if not isinstance(given, Sequence):
        step = num_examples if given is None else int(given)
        return [Part(a, min(a + step, num_examples)) for a in range(0, num_examples, step)]
    if sum(given) != num_examples:
        raise LayoutError(
            f"the micro-batches {list(given)} hold {sum(given)} examples, "
            f"but the share holds {num_examples}."
        )
    ends = [sum(given[: i + 1]) for i in range(len(given))]
    return [Part(end - n, end) for n, end in zip(given, ends, strict=True)]


def grains(place: Place, grain: int | None, layout: Layout, why: str) -> list[Part]:
    """The parts of a share whose model must run one grain at a time.

    Args:
        why: what makes it so, for the message, such as "fc.dropout draws random numbers".

    Raises:
        LayoutError: a share or a micro-batch that would cut a grain.
    """
    size = place.total if grain is None else grain
    edges = _edges(place.total, size)
    advice = (
        "Declare Objective(grain=...), a number of examples that fits in memory: it is part of "
        "the objective, since the examples of a grain share their random numbers and statistics."
        if grain is None
        else "Make shares and micro-batches of whole grains."
    )
    for name, edge in (("starts", place.start), ("ends", place.stop)):
        if edge not in edges:
            raise LayoutError(
                f"{why}, so the model runs in grains of {size} examples, but a rank's share "
                f"{name} at example {edge} of {place.total}, inside a grain. {advice}"
            )
    # "auto" yields to the grain, which says what runs together.
    cuts = [] if layout.micro_batch == "auto" else micro_batches(layout, place.stop - place.start)
    smallest = min((part.stop - part.start for part in cuts[:-1]), default=size)
    if len(cuts) > 1 and smallest < size:
        raise LayoutError(
            f"{why}, so the model runs in grains of {size} examples, "
            f"but a micro-batch holds {smallest}. {advice}"
        )
    return [
        Part(a - place.start, b - place.start, index)
        for index, (a, b) in enumerate(pairwise(edges))
        if place.start <= a and b <= place.stop
    ]


def runs(place: Place, grain: int | None) -> list[tuple[int, int]]:
    """The grains of each rank's share, of whole ones: the first, and the one after the last."""
    edges = _edges(place.total, place.total if grain is None else grain)
    cuts = [bisect_left(edges, cut) for cut in place.cuts or (0, place.total)]
    return list(pairwise(cuts))


def _edges(total: int, size: int) -> list[int]:
    """Where the grains of a batch begin, and total."""
    edges = [*range(0, total, size), total]
    if len(edges) > 2 and edges[-1] - edges[-2] < min(2, size):
        del edges[-2]
    return edges
