"""Batches of examples of similar length: little padding, and still each example once an epoch.

    permutation of the epoch, as of `Order`:  x_0 x_1 ... x_{N-1}
    window w = 0, 1, ...:  the next W whole batches of it, sorted by length, ties as they came
    batch b of window w:   the next B examples of these
    visits of the window:  its batches by ascending  mix(K' + (b+1) gamma),   K' = K(K(seed, e), w)

N examples, B a batch, epoch e; K, mix and gamma as in `anybatch.order`. The last window has what
whole batches are left. The ragged end, N mod B examples, is that of the permutation, unsorted: cut
from a sorted window it would be its longest examples each time.

Which examples share a window, ties, and the visits are random, so each example is equally likely
in every step of B, and the mean over a batch has the expectation that it has under `Order`. But
the examples of a batch are alike: where the gradient goes with length, steps are noisier, the more
so the larger W. And a mean over tokens divides by the batch's own count: where a batch is of one
length it is the mean of the example means, so tokens of short examples weigh more than under
`Order`; `Sum` divided by the tokens of a usual batch weighs all alike. At W = 1 batches are those
of `Order`; where a window is the whole epoch, only the visits and ties change from epoch to epoch.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from anybatch.errors import OrderError
from anybatch.order import (
    Order,
    OrderProtocol,
    _check_fits,
    _check_integers,
    _examples,
    _integer,
    _keys,
    _words,
)
from anybatch.order.per_example import digest, numbers

__all__ = ["ByLength", "padding_share"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ByLength:
    """Each epoch a permutation, sorted by length in windows and visited batch by batch at random.

    Within a batch examples ascend in length, so that its micro-batches are more alike still.

    Args:
        lengths: [N], what is padded: tokens, frames, seconds; finite and at least 0.
        batch_size: B, examples of one step, over all ranks.
        seed: chooses permutations and visits, 0 to 2^64 - 1.
        last: an epoch's ragged end of N mod B examples is a short batch, the last of the epoch
            ("keep"), or is left out that epoch ("drop").
        window: W, batches whose examples are sorted together.

    Raises:
        OrderError: an argument is out of range or of the wrong kind, or B > N.

    Source: transformers, `get_length_grouped_indices`: windows of up to 50 batches, there visited
        from the longest to the shortest.
    """

    lengths: ArrayLike = field(kw_only=False, repr=False, compare=False)
    batch_size: int
    seed: int = 0
    last: Literal["keep", "drop"] = "keep"
    window: int = 50
    num_examples: int = field(init=False)
    lengths_digest: str = field(init=False)  # runs compare orders by what they print
    _order: Order = field(init=False, repr=False, compare=False)  # without lengths

    def __post_init__(self) -> None:
        lengths = numbers("lengths", self.lengths)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "lengths_digest", digest(lengths))
        object.__setattr__(self, "num_examples", len(lengths))
        _check_integers(self)
        _check_fits(self.batch_size, self.num_examples)
        if self.last not in ("keep", "drop"):
            raise OrderError(
                f"last is {self.last!r}, expected 'keep' (a short last batch) or 'drop' (the "
                f"ragged end is left out). Windows end with the epoch, so no batch goes on."
            )
        order = Order(self.num_examples, batch_size=self.batch_size, seed=self.seed, last=self.last)
        object.__setattr__(self, "_order", order)

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples of this step: int64 [B] on the CPU, ascending in length.

        [N mod B], of any lengths, for a short last batch.

        Raises:
            OrderError: step is negative or not an integer.
        """
        step = _integer("step", step, 0, "Steps count from 0.")
        epoch, first, count = self._order._span(step)
        if count < self.batch_size:
            return self._order.indices(step)
        window, visit = divmod(first // self.batch_size, self.window)
        return torch.from_numpy(_batches(self, epoch, window)[visit].copy())

    def num_steps(self, epochs: int) -> int:
        """Number of steps in this many epochs: ceil(N / B) each, or floor(N / B) with "drop"."""
        return self._order.num_steps(epochs)

    def epoch(self, step: int) -> int:
        """Epoch of this step, from 0."""
        return self._order.epoch(step)

    def examples_before(self, step: int) -> int:
        """Number of examples used before this step; what "drop" leaves out does not count."""
        return self._order.examples_before(step)

    def visits(self, step: int) -> list[int]:
        """What tells the visits of one example apart, for each example of this step: its epoch."""
        return self._order.visits(step)


def padding_share(order: OrderProtocol, lengths: ArrayLike, epochs: int = 1) -> float:
    """Share of padding where each batch is padded to its longest, 1 - sum n_i / sum B max n_i.

    Args:
        order: any, such as `Order` to compare with.
        lengths: [N], n_i.
        epochs: over how many the sums go.

    Raises:
        OrderError: lengths that are no lengths.
    """
    of = numbers("lengths", lengths)
    batches = [of[order.indices(step).numpy()] for step in range(order.num_steps(epochs))]
    padded = sum(len(batch) * float(batch.max()) for batch in batches)
    return 1 - sum(float(batch.sum()) for batch in batches) / padded if padded else 0.0


@lru_cache(maxsize=2)  # holds on to these orders, and their lengths, until others are asked
def _batches(order: ByLength, epoch: int, window: int) -> NDArray[np.int64]:
    """The batches of a window as they are visited: [W, B], or fewer in an epoch's last."""
    whole, size = order.num_examples // order.batch_size, order.batch_size
    first = window * order.window
    count = min(order.window, whole - first)
    examples = _examples(order._order, epoch * order.num_examples + first * size, count * size)
    ascending = np.argsort(np.asarray(order.lengths)[examples], kind="stable")
    of_epoch = _keys(np.array([order.seed], np.uint64), np.array([epoch % 2**64], np.uint64))
    visits = np.argsort(_words(_keys(of_epoch, np.array([window], np.uint64)), 0, count))
    return examples[ascending].reshape(count, size)[visits]
