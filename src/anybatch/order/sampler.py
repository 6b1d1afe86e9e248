"""Batches of an order for a torch `DataLoader`: the ids of one rank's share of each batch.

    share of rank r of R in a batch of B  =  places floor(r B / R) .. floor((r + 1) B / R) - 1

The ranks' shares of a step are its batch, so another number of ranks reads the same batches.
"""

from collections.abc import Iterator, Mapping
from typing import Any, final

from torch.utils.data import Sampler

from anybatch.errors import OrderError
from anybatch.order.arguments import check_integer
from anybatch.order.protocol import OrderProtocol

__all__ = ["BatchSampler", "HasSampler"]


@final
class BatchSampler(Sampler[list[int]]):
    """Yields lists of ids, an epoch at each iteration; for `DataLoader(batch_sampler=...)`.

    Args:
        order: which examples make up each batch.
        rank, num_ranks: whose share to yield; all ranks' shares together are the batch.
        start: first step, counted over all epochs; any, at no cost. The first iteration ends with
            the epoch of this step.

    Raises:
        OrderError: an argument is out of range; in the iteration, a batch with fewer examples than
            ranks.

    Example:
        >>> import anybatch as ab
        >>> order = ab.Order(10, batch_size=4, seed=0)
        >>> list(order.sampler())
        [[3, 4, 6, 9], [5, 7, 8, 2], [1, 0]]
        >>> list(order.sampler(rank=1, num_ranks=2, start=1))
        [[8, 2], [0]]
    """

    def __init__(
        self, order: OrderProtocol, *, rank: int = 0, num_ranks: int = 1, start: int = 0
    ) -> None:
        self._order = order
        self._num_ranks = check_integer("num_ranks", num_ranks, 1, "Pass the world size.")
        self._rank = check_integer("rank", rank, 0, "Ranks count from 0.")
        if self._rank >= self._num_ranks:
            raise OrderError(f"rank is {rank} of {num_ranks} ranks. Ranks count from 0.")
        self._step = check_integer("start", start, 0, "Steps count from 0.")

    @property
    def step(self) -> int:
        """Next step to yield."""
        return self._step

    def __len__(self) -> int:
        """Return the number of batches until the end of the epoch of the next step."""
        return self._find_end() - self._step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches until the end of the epoch of the next step."""
        for step in range(self._step, self._find_end()):
            share = self._list_share(step)
            self._step = step + 1
            yield share

    def set_epoch(self, epoch: int) -> None:
        """Go to the first step of an epoch, unless the next step lies within it.

        Trainers call it before each epoch. A sampler that starts in the middle stays there.
        """
        epoch = check_integer("epoch", epoch, 0, "Epochs count from 0.")
        if self._order.epoch(self._step) != epoch:
            self._step = self._find_first_step(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the next step.

        A `DataLoader` with workers asks for batches ahead of the loop, so its sampler is ahead too.
        `torchdata.StatefulDataLoader` takes account of that. With another loader, count the steps
        of the loop, and make the sampler with `start=`.
        """
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the step that `state_dict` has returned; the number of ranks may differ."""
        self._step = check_integer("step", state["step"], 0, "Steps count from 0.")

    def _find_end(self) -> int:
        """Return the first step after the epoch of the next step."""
        return self._find_first_step(self._order.epoch(self._step) + 1)

    def _find_first_step(self, epoch: int) -> int:
        step = self._order.num_steps(epoch)
        while self._order.epoch(step) < epoch:  # a batch that runs on into this epoch
            step += 1
        return step

    def _list_share(self, step: int) -> list[int]:
        ids: list[int] = self._order.indices(step).tolist()
        size, r = len(ids), self._rank
        if size < self._num_ranks:
            raise OrderError(
                f"The batch of step {step} is smaller ({size}) than the number of ranks "
                f"({self._num_ranks}), so a rank would get no example. Use last='carry' or "
                f"last='drop', or a larger batch."
            )
        return ids[r * size // self._num_ranks : (r + 1) * size // self._num_ranks]


class HasSampler:
    """An order with a method that makes its sampler."""

    __slots__ = ()

    def sampler(
        self: OrderProtocol, rank: int = 0, num_ranks: int = 1, start: int = 0
    ) -> BatchSampler:
        """Make a batch sampler for a torch `DataLoader`; see `BatchSampler`."""
        return BatchSampler(self, rank=rank, num_ranks=num_ranks, start=start)
