"""Draws with replacement, each example in proportion to its weight.

    example(p) = the least i with  c_i > u(p) c_{N-1},      c_i = w_0 + ... + w_i
    u(p) = top 53 bits of mix(K + (p+1) gamma) / 2^53,      K = mix(mix(seed + gamma) + gamma)

Positions p = 0, 1, 2, ... run on through all epochs, an epoch being N draws; u is uniform on
[0, 1), mix and gamma as in `anybatch.order`. An example of weight 0 is never drawn. The sums c are
of float64: a share of less than about 2^-53 of the whole is not resolved.

Weights change what is minimised: the mean over a batch has the expectation

    E[(1/B) sum over the batch of v]  =  sum_i w_i v_i / sum_i w_i

in the values and in the gradient. To draw unevenly and minimise the plain mean all the same, each
loss must be divided by N w_i / sum w: importance sampling.
"""

from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from anybatch.errors import OrderError
from anybatch.order import Order, _check_fits, _check_integers, _keys, _words
from anybatch.order.per_example import digest, numbers

__all__ = ["Weighted"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """Draws with replacement in proportion to weights; each draw is one of N in an epoch.

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
    weights_digest: str = field(init=False)  # runs compare orders by what they print
    _sums: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # [N], c / max w
    _order: Order = field(init=False, repr=False, compare=False)  # counts the same steps

    def __post_init__(self) -> None:
        weights = numbers("weights", self.weights)
        if not weights.any():
            raise OrderError(
                f"all {len(weights)} weights are 0, expected one above 0: there is nothing to "
                f"draw. Does every example match a rule that was to leave some out?"
            )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "weights_digest", digest(weights))
        object.__setattr__(self, "num_examples", len(weights))
        _check_integers(self)
        _check_fits(self.batch_size, self.num_examples)
        object.__setattr__(self, "_sums", np.cumsum(weights / weights.max()))  # never infinite
        order = Order(self.num_examples, batch_size=self.batch_size, seed=self.seed, last="carry")
        object.__setattr__(self, "_order", order)

    def indices(self, step: int) -> torch.Tensor:
        """Indices of the examples of this step: int64 [B] on the CPU, some more than once.

        Raises:
            OrderError: step is negative or not an integer.
        """
        key = _keys(np.array([self.seed], np.uint64), np.zeros(1, np.uint64))
        words = _words(key, self.examples_before(step), self.batch_size)
        uniform = (words >> 11).astype(np.float64) * 2.0**-53
        # u < 1 and so u c < c, rounded too: an index past the end cannot come out.
        drawn = np.searchsorted(self._sums, uniform * self._sums[-1], side="right")
        return torch.from_numpy(drawn.astype(np.int64, copy=False))

    def num_steps(self, epochs: int) -> int:
        """Number of whole steps in this many epochs of N draws."""
        return self._order.num_steps(epochs)

    def epoch(self, step: int) -> int:
        """Epoch of the first draw of this step, from 0."""
        return self._order.epoch(step)

    def examples_before(self, step: int) -> int:
        """Number of draws before this step."""
        return self._order.examples_before(step)

    def visits(self, step: int) -> list[int]:
        """What tells the visits of one example apart, for each draw of this step: its position."""
        first = self.examples_before(step)
        return list(range(first, first + self.batch_size))
