"""Batches that grow with the examples used so far, where a learning rate would fall.

    batch size of a step = B_k,   k the last with E_k <= examples used before the step

sizes (E_0, B_0), (E_1, B_1), ... with E_0 = 0. The examples are those of `Order` with
last="carry": one permutation after the other, cut into batches that go on into the next epoch.

The noise of SGD under `Mean` goes with lr (N / B - 1), about lr N / B, N examples in the data:
multiplying B by a does to it what dividing lr by a does, in fewer updates. Under `Sum` the
gradient grows with B, and the noise stays.

Source: Smith, Kindermans, Ying and Le 2018, Don't decay the learning rate, increase the batch
size, 1711.00489, section 3.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any, TypeGuard, final

import torch

from anybatch.errors import OrderError
from anybatch.order import Order, _check_fits, _examples, _integer

__all__ = ["Growing"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """A new permutation of the data each epoch, cut into batches of growing size.

    Args:
        num_examples: N, examples in the data set, 1 to 10^12.
        sizes: pairs (examples used so far, batch size from there on), both rising, the first
            from 0, such as ((0, 32), (50_000, 64)). A step under way when a pair begins keeps
            its size.
        seed: chooses the permutations, 0 to 2^64 - 1.

    Raises:
        OrderError: an argument is out of range or of the wrong kind, or a batch size above N.
    """

    num_examples: int = field(kw_only=False)
    sizes: Sequence[tuple[int, int]]
    seed: int = 0
    _order: Order = field(init=False, repr=False, compare=False)  # its examples, one by one
    _starts: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        order = Order(self.num_examples, batch_size=1, seed=self.seed, last="carry")
        sizes = _checked(self.sizes, order.num_examples)
        object.__setattr__(self, "num_examples", order.num_examples)
        object.__setattr__(self, "seed", order.seed)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_starts", _starts(sizes))

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples of this step: int64 [B_k] on the CPU, the caller's to change.

        Raises:
            OrderError: step is negative or not an integer.
        """
        return torch.from_numpy(_examples(self._order, *self._span(step)))

    def num_steps(self, epochs: int) -> int:
        """Number of whole steps in this many epochs."""
        end = self._order.num_steps(epochs)  # in examples
        number = bisect_right(self._starts, end, key=itemgetter(1)) - 1
        step, before = self._starts[number]
        return step + (end - before) // self.sizes[number][1]

    def epoch(self, step: int) -> int:
        """Epoch of the first example of this step, from 0."""
        return self._span(step)[0] // self.num_examples

    def examples_before(self, step: int) -> int:
        """Number of examples used before this step."""
        return self._span(step)[0]

    def visits(self, step: int) -> list[int]:
        """What tells the visits of one example apart, for each example of this step: its epoch."""
        before, size = self._span(step)
        return [place // self.num_examples for place in range(before, before + size)]

    def _span(self, step: int) -> tuple[int, int]:
        """Examples used before this step, and its batch size."""
        step = _integer("step", step, 0, "Steps count from 0.")
        number = bisect_right(self._starts, step, key=itemgetter(0)) - 1
        first, before = self._starts[number]
        size = self.sizes[number][1]
        return before + (step - first) * size, size


def _starts(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The first step of each size, and the examples used before it; the last holds where equal."""
    starts = [(0, 0)]
    for (_, size), (until, _) in pairwise(sizes):
        step, before = starts[-1]
        num_steps = -((before - until) // size)  # rounded up; 0 where passed, by under a batch
        starts.append((step + num_steps, before + num_steps * size))
    return tuple(starts)


def _checked(sizes: object, num_examples: int) -> tuple[tuple[int, int], ...]:
    """The pairs as tuples of integers.

    Raises:
        OrderError: they are no such pairs.
    """
    if not (_is_sequence(sizes) and sizes and all(_is_sequence(p) and len(p) == 2 for p in sizes)):
        raise OrderError(
            f"sizes are {sizes!r}, expected pairs (examples used so far, batch size from there "
            f"on), such as ((0, 32), (50_000, 64))."
        )
    pairs = tuple(
        (
            _integer("examples used so far", examples, 0, "They come first in a pair of sizes."),
            _integer("batch size", size, 1, "It comes second in a pair of sizes."),
        )
        for examples, size in sizes
    )
    if pairs[0][0] != 0 or any(a >= c or b >= d for (a, b), (c, d) in pairwise(pairs)):
        raise OrderError(
            f"sizes are {pairs}, expected the first pair to begin at 0 examples and both numbers "
            f"to rise from pair to pair. Are they in order, with the examples first?"
        )
    _check_fits(pairs[-1][1], num_examples)
    return pairs


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)
