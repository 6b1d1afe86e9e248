"""Draws with replacement, in which an example is drawn in proportion to its weight.

    example(p) = the least i with  c_i > u(p) c_{N-1},      c_i = w_0 + ... + w_i
    u(p) = top 53 bits of mix(K + (p+1) gamma) / 2^53,      K = mix(mix(seed + gamma) + gamma)

Positions p = 0, 1, 2, ... run on through all epochs. An epoch is N draws. u is uniform on [0, 1);
mix and gamma are those of `anybatch.order.permutation`. An example of weight 0 is never drawn. The
sums c are in float64, so a share below about 2^-53 of the whole is lost.

Weights change the objective. The mean over a batch has the expectation

    E[(1/B) sum over the batch of v]  =  sum_i w_i v_i / sum_i w_i

in the values and in the gradient. To minimise the plain mean with uneven draws, divide each loss
by N w_i / sum w (importance sampling).
"""

from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from anybatch.errors import OrderError
from anybatch.order.arguments import (
    check_batch_size,
    check_integers,
    compute_digest,
    copy_numbers,
)
from anybatch.order.order import Order
from anybatch.order.permutation import derive_keys, random_words
from anybatch.order.sampler import HasSampler

__all__ = ["Weighted"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted(HasSampler):
    """Draws with replacement in proportion to weights, N in an epoch.

    >>> import anybatch as ab
    >>> order = ab.Weighted([1.0, 0.0, 3.0], batch_size=3, seed=0)
    >>> [order.indices(step).tolist() for step in range(3)]
    [[0, 2, 2], [2, 2, 2], [2, 0, 0]]

    Args:
        weights: [N], finite, at least 0 and not all 0; their sum does not matter.
        batch_size: B, draws of one step, over all ranks. Batches go on into the next epoch.
        seed: chooses the draws, 0 to 2^64 - 1.

    Raises:
        OrderError: an argument is out of range or of the wrong kind, or B > N.
    """

    weights: ArrayLike = field(kw_only=False, repr=False, compare=False)
    batch_size: int
    seed: int = 0
    num_examples: int = field(init=False)
    weights_digest: str = field(init=False)  # in the repr, by which runs compare orders
    _sums: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # [N], c / max w
    _order: Order = field(init=False, repr=False, compare=False)  # of the same steps

    def __post_init__(self) -> None:
        weights = copy_numbers("weights", self.weights)
        if not weights.any():
            raise OrderError(
                f"All {len(weights)} weights are 0. At least one must be above 0, or there is "
                f"nothing to draw. Does a rule that leaves out some examples match all of them?"
            )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "weights_digest", compute_digest(weights))
        object.__setattr__(self, "num_examples", len(weights))
        check_integers(self)
        check_batch_size(self.batch_size, self.num_examples)
        object.__setattr__(self, "_sums", np.cumsum(weights / weights.max()))  # cannot overflow
        order = Order(self.num_examples, batch_size=self.batch_size, seed=self.seed, last="carry")
        object.__setattr__(self, "_order", order)

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of the examples of this step: int64 [B] on the CPU, with repeats.

        Raises:
            OrderError: step is negative or not an integer.
        """
        key = derive_keys(np.array([self.seed], np.uint64), np.zeros(1, np.uint64))
        words = random_words(key, self.examples_before(step), self.batch_size)
        uniform = (words >> 11).astype(np.float64) * 2.0**-53
        # u < 1, so u c < c even when rounded, and no index is past the end.
        examples = np.searchsorted(self._sums, uniform * self._sums[-1], side="right")
        return torch.from_numpy(examples.astype(np.int64, copy=False))

    def num_steps(self, epochs: int) -> int:
        """Return the number of whole steps in this many epochs of N draws."""
        return self._order.num_steps(epochs)

    def epoch(self, step: int) -> int:
        """Return the epoch of the first draw of this step, from 0."""
        return self._order.epoch(step)

    def examples_before(self, step: int) -> int:
        """Return the number of draws before this step."""
        return self._order.examples_before(step)

    def visits(self, step: int) -> list[int]:
        """Return the position of each draw of this step: it tells an example's visits apart."""
        first = self.examples_before(step)
        return list(range(first, first + self.batch_size))
