"""Batches that grow with the number of examples used while the learning rate stays.

    batch size of a step = B_k,   k the last with E_k <= examples used before the step

sizes (E_0, B_0), (E_1, B_1), ... with E_0 = 0. The examples are those of `Order` with
last="carry": one permutation after the other, cut into batches that go on into the next epoch.

The noise of SGD under `Mean` goes with lr (N / B - 1), about lr N / B, for N examples in the data.
So multiplying B by a has the effect of dividing lr by a, in fewer updates. Under `Sum` the gradient
grows with B, and the noise stays.

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
from anybatch.order.arguments import check_batch_size, check_integer, check_integers, check_step
from anybatch.order.permutation import get_examples
from anybatch.order.sampler import HasSampler

__all__ = ["Growing"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Growing(HasSampler):
    """A new permutation of the data each epoch, cut into batches of growing size.

    >>> import anybatch as ab
    >>> order = ab.Growing(10, sizes=((0, 2), (6, 4)), seed=0)
    >>> [len(order.indices(step)) for step in range(order.num_steps(epochs=2))]
    [2, 2, 2, 4, 4, 4]

    Args:
        num_examples: N, examples in the data set, 1 to 10^12.
        sizes: pairs (examples used so far, batch size from there on), both rising, the first
            from 0, such as ((0, 32), (50_000, 64)). A batch in which a pair begins keeps its
            size.
        seed: chooses the permutations, 0 to 2^64 - 1.

    Raises:
        OrderError: an argument is out of range or of the wrong kind, or a batch size above N.
    """

    num_examples: int = field(kw_only=False)
    sizes: Sequence[tuple[int, int]]
    seed: int = 0
    _starts: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_integers(self)
        sizes = _check_sizes(self.sizes, self.num_examples)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "_starts", _find_starts(sizes))

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of the examples of this step: int64 [B_k] on the CPU, a fresh tensor.

        Raises:
            OrderError: step is negative or not an integer.
        """
        position, count = self._locate(step)
        return torch.from_numpy(get_examples(self.num_examples, self.seed, position, count))

    def num_steps(self, epochs: int) -> int:
        """Return the number of whole steps in this many epochs."""
        end = check_integer("epochs", epochs, 0, "Whole epochs only.") * self.num_examples
        number = bisect_right(self._starts, end, key=itemgetter(1)) - 1
        step, before = self._starts[number]
        return step + (end - before) // self.sizes[number][1]

    def epoch(self, step: int) -> int:
        """Return the epoch of the first example of this step, from 0."""
        return self._locate(step)[0] // self.num_examples

    def examples_before(self, step: int) -> int:
        """Return the number of examples used before this step."""
        return self._locate(step)[0]

    def visits(self, step: int) -> list[int]:
        """Return the epoch of each example of this step: it tells the example's visits apart."""
        before, size = self._locate(step)
        return [place // self.num_examples for place in range(before, before + size)]

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the number of examples used before this step, and its batch size."""
        step = check_step(step)
        number = bisect_right(self._starts, step, key=itemgetter(0)) - 1
        first, before = self._starts[number]
        size = self.sizes[number][1]
        return before + (step - first) * size, size


def _find_starts(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the first step of each size, and the examples used before it.

    Two sizes may start at the same step, if a batch reaches past both; the later one then holds.
    """
    starts = [(0, 0)]
    for (_, size), (until, _) in pairwise(sizes):
        step, before = starts[-1]
        num_steps = -((before - until) // size)  # rounded up; 0 if a batch has reached past it
        starts.append((step + num_steps, before + num_steps * size))
    return tuple(starts)


def _check_sizes(sizes: object, num_examples: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs as tuples of integers.

    Raises:
        OrderError: they are no such pairs.
    """
    if not (_is_sequence(sizes) and sizes and all(_is_sequence(p) and len(p) == 2 for p in sizes)):
        raise OrderError(
            f"sizes are {sizes!r}. They must be pairs (examples used so far, batch size from there "
            f"on), such as ((0, 32), (50_000, 64))."
        )
    pairs = tuple(
        (
            check_integer(
                "examples used so far", examples, 0, "It is the first of a pair of sizes."
            ),
            check_integer("batch size", size, 1, "It is the second of a pair of sizes."),
        )
        for examples, size in sizes
    )
    if pairs[0][0] != 0 or any(a >= c or b >= d for (a, b), (c, d) in pairwise(pairs)):
        raise OrderError(
            f"sizes are {pairs}. The first pair must begin at 0 examples, and both numbers must "
            f"rise from pair to pair. Are they in order, with the examples first?"
        )
    check_batch_size(pairs[-1][1], num_examples)
    return pairs


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)
