"""Buffers of a model, such as running statistics: one update a batch, whatever the layout.

    b' = sum over parts (n_p / B) * b_p,    each part p starting from b

Where a layer computes b_p = (1 - m) b + m s_p, this is one update with the count-weighted mean
of the statistics s_p. Counters, being integers, are the same after each part.
"""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup

__all__ = ["Buffers"]


class Buffers:
    """The buffers of a model during one update; put back where the update fails."""

    def __init__(self, model: nn.Module) -> None:
        self._now = list(model.buffers())
        self._before = [b.detach().clone() for b in self._now]
        self._after = [torch.zeros_like(b, dtype=_wide(b)) for b in self._now]
        self._changed = [False] * len(self._now)
        self._versions = [b._version for b in self._now]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to what they were before the update."""
        for i, (now, before) in enumerate(zip(self._now, self._before, strict=True)):
            if now._version != self._versions[i]:
                now.copy_(before)
                self._versions[i] = now._version

    @torch.no_grad()
    def collect(self, weight: float) -> None:
        """Take in what a part has left, with its weight n_p / B."""
        for i, (now, after) in enumerate(zip(self._now, self._after, strict=True)):
            self._changed[i] |= now._version != self._versions[i]
            if now.is_floating_point():
                after.add_(now, alpha=weight)
            else:
                after.copy_(now)

    @torch.no_grad()
    def commit(self, group: ProcessGroup | None) -> None:
        """Set what any part has changed to the weighted mean over the parts of all ranks."""
        if not self._now:
            return
        whole = [None if b.is_floating_point() else b for b in self._after]
        told = distributed.everywhere(lambda: (self._changed, whole), group)
        distributed.all_sum([b for b in self._after if b.is_floating_point()], group)
        for i, (now, after) in enumerate(zip(self._now, self._after, strict=True)):
            ranks = [counters[i] for changed, counters in told if changed[i]]
            if ranks:
                now.copy_(after if ranks[0] is None else ranks[0])


def _wide(buffer: Tensor) -> torch.dtype:
    return torch.float32 if buffer.dtype in (torch.float16, torch.bfloat16) else buffer.dtype
