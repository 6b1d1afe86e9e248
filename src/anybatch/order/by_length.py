"""Batches of examples of similar length: little padding, and each example once an epoch.

    permutation of the epoch, as of `Order`:  x_0 x_1 ... x_{N-1}
    window w = 0, 1, ...:  the next W whole batches of it, sorted by length, ties as they came
    batch b of window w:   the next B examples of these
    visits of the window:  its batches by ascending  mix(K' + (b+1) gamma),   K' = K(K(seed, e), w)

N examples, B a batch, epoch e; K, mix and gamma as in `anybatch.order.permutation`. The last window
has the remaining whole batches. The last N mod B examples are those of the permutation, unsorted:
cut from a sorted window they would be its longest examples each time.

Windows, ties and visits are random, so each example is equally likely in every step of B. The mean
over a batch therefore has the same expectation as under `Order`. Two things differ:

* The examples of a batch are alike. If the gradient depends on length, steps are noisier, and more
  so for a larger W.
* A mean over tokens divides by the batch's own count. In a batch of one length it is the mean of
  the examples' means, so tokens of short examples weigh more than under `Order`. `Sum`, divided by
  the tokens of a usual batch, weighs all tokens the same.

With W = 1 batches are those of `Order`. If one window is the whole epoch, only visits and ties
change from epoch to epoch.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from anybatch.errors import OrderError
from anybatch.order.arguments import (
    check_batch_size,
    check_integers,
    check_step,
    compute_digest,
    copy_numbers,
)
from anybatch.order.order import Order
from anybatch.order.permutation import derive_keys, get_examples, random_words
from anybatch.order.protocol import OrderProtocol
from anybatch.order.sampler import HasSampler

__all__ = ["ByLength", "padding_share"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ByLength(HasSampler):
    """A permutation an epoch, sorted by length in windows, whose batches are visited at random.

    Examples ascend in length within a batch, so its micro-batches are even more alike.

    >>> import anybatch as ab
    >>> order = ab.ByLength([5, 1, 4, 2, 6, 3], batch_size=2, seed=0)
    >>> [order.indices(step).tolist() for step in range(order.num_steps(epochs=1))]
    [[0, 4], [1, 3], [5, 2]]

    Args:
        lengths: [N], lengths that are padded: tokens, frames, seconds; finite and at least 0.
        batch_size: B, examples of one step, over all ranks.
        seed: chooses permutations and visits, 0 to 2^64 - 1.
        last: use of the N mod B examples at an epoch's end: a short batch, the last of the epoch
            ("keep"), or none in that epoch ("drop").
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
    lengths_digest: str = field(init=False)  # in the repr, by which runs compare orders
    _order: Order = field(init=False, repr=False, compare=False)  # without lengths

    def __post_init__(self) -> None:
        lengths = copy_numbers("lengths", self.lengths)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "lengths_digest", compute_digest(lengths))
        object.__setattr__(self, "num_examples", len(lengths))
        check_integers(self)
        check_batch_size(self.batch_size, self.num_examples)
        if self.last not in ("keep", "drop"):
            raise OrderError(
                f"last is {self.last!r}. It must be 'keep' (a short last batch) or 'drop' (the "
                f"last N mod B examples are left out). Windows end with the epoch, so no batch "
                f"goes on."
            )
        order = Order(self.num_examples, batch_size=self.batch_size, seed=self.seed, last=self.last)
        object.__setattr__(self, "_order", order)

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of the examples of this step: int64 [B] on the CPU.

        Their lengths ascend, except in a short last batch, [N mod B].

        Raises:
            OrderError: step is negative or not an integer.
        """
        epoch, batch = divmod(check_step(step), self._order.num_steps(1))
        if batch == self.num_examples // self.batch_size:  # the short last batch
            return self._order.indices(step)
        window, visit = divmod(batch, self.window)
        return torch.from_numpy(_get_batches(self, epoch, window)[visit].copy())

    def num_steps(self, epochs: int) -> int:
        """Return the number of steps in this many epochs.

        keep: epochs ceil(N / B); drop: epochs floor(N / B).
        """
        return self._order.num_steps(epochs)

    def epoch(self, step: int) -> int:
        """Return the epoch of this step, from 0."""
        return self._order.epoch(step)

    def examples_before(self, step: int) -> int:
        """Return the number of examples used before this step; "drop" uses only whole batches."""
        return self._order.examples_before(step)

    def visits(self, step: int) -> list[int]:
        """Return the epoch of each example of this step: it tells the example's visits apart."""
        return self._order.visits(step)


def padding_share(order: OrderProtocol, lengths: ArrayLike, epochs: int = 1) -> float:
    """Return the share of padding if each batch is padded to its longest example.

        1 - (sum of n_i) / (sum over batches of B max n_i)

    >>> import anybatch as ab
    >>> lengths = [5, 1, 4, 2, 6, 3]
    >>> round(ab.padding_share(ab.Order(6, batch_size=2, shuffle=False), lengths), 3)
    0.3
    >>> ab.padding_share(ab.ByLength(lengths, batch_size=2), lengths)
    0.125

    Args:
        order: any, such as `Order` to compare with.
        lengths: [N], n_i.
        epochs: number of epochs to sum over.

    Raises:
        OrderError: lengths that are no lengths.
    """
    numbers = copy_numbers("lengths", lengths)
    batches = [numbers[order.indices(step).numpy()] for step in range(order.num_steps(epochs))]
    padded = sum(len(batch) * float(batch.max()) for batch in batches)
    return 1 - sum(float(batch.sum()) for batch in batches) / padded if padded else 0.0


@lru_cache(maxsize=2)  # the cache keeps two orders, and their lengths, in memory
def _get_batches(order: ByLength, epoch: int, window: int) -> NDArray[np.int64]:
    """Return the batches of a window in the order of visits: [W, B], fewer in the last window."""
    size = order.batch_size
    first = window * order.window
    count = min(order.window, order.num_examples // size - first)
    position = epoch * order.num_examples + first * size
    examples = get_examples(order.num_examples, order.seed, position, count * size)
    ascending = np.argsort(np.asarray(order.lengths)[examples], kind="stable")
    epoch_key = derive_keys(np.array([order.seed], np.uint64), np.array([epoch % 2**64], np.uint64))
    window_key = derive_keys(epoch_key, np.array([window], np.uint64))
    visits = np.argsort(random_words(window_key, 0, count))
    return examples[ascending].reshape(count, size)[visits]
