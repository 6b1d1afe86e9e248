"""Buffers of a model, such as running statistics: one update a batch, whatever the layout.

    b' = sum over parts (n_p / B) * b_p,    each part p starting from b

Where a layer computes b_p = (1 - m) b + m s_p, this is one update with the count-weighted mean
of the statistics s_p. What has no mean stays as the last part leaves it: a counter, which is
the same after each part, or a cache, whose shape changes. What no part changes keeps its bits.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup

__all__ = ["Buffers"]


class Buffers:
    """The buffers of a model during one update."""

    def __init__(self, held: Iterable[tuple[nn.Module, str, Tensor]]) -> None:
        """Take the buffers by the module and name that hold them."""
        self._all = [_Buffer(*one) for one in held]
        self._weight = 0.0  # of the parts so far

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """All buffers of a model."""
        return cls(
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        )

    def restore(self) -> None:
        """Back to what they were before the update."""
        for buffer in self._all:
            if buffer.is_changed:
                buffer.set(buffer.before)

    def collect(self, weight: float) -> None:
        """Take in what a part has left, with its weight n_p / B."""
        for buffer in self._all:
            buffer.collect(weight, self._weight)
        self._weight += weight

    def commit(self, group: ProcessGroup | None) -> None:
        """Set what any part has changed to the weighted mean over the parts of all ranks."""
        if not self._all:
            return
        told = distributed.everywhere(lambda: [b.outcome(group) for b in self._all], group)
        averaged = []
        for buffer, *outcomes in zip(self._all, *told, strict=True):
            last = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
            if last:
                buffer.set(last[-1])
            elif any(outcomes):
                averaged.append(buffer)
            elif buffer.is_changed:  # by a backward pass, or a forward pass that does not count
                buffer.set(buffer.before)
        means = [buffer.mean(self._weight) for buffer in averaged]
        distributed.all_sum(means, group)
        for buffer, mean in zip(averaged, means, strict=True):
            buffer.set(mean)


class _Buffer:
    """One buffer of one module, which forward passes change in place or replace."""

    def __init__(self, module: nn.Module, name: str, own: Tensor) -> None:
        self._module, self._name, self._own = module, name, own
        self.before = own.detach().clone()
        self._version = own._version
        self._mean: Tensor | None = None  # sum of weight * b_p so far, None before any change
        self._last: Tensor | None = None  # what a part has left that has no mean

    @property
    def is_changed(self) -> bool:
        """Whether it is other than before; a change through `.data` leaves the version as it is."""
        if self._now is not self._own or self._own._version != self._version:
            return True
        return not _same(self._own, self.before)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Give it a value, in the tensor that it was where the shape allows."""
        if value.shape == self._own.shape:
            self._own.copy_(value)
            self._version = self._own._version
            self._module._buffers[self._name] = self._own
        else:
            self._module._buffers[self._name] = value.to(self._own.device)

    @torch.no_grad()
    def collect(self, weight: float, weight_before: float) -> None:
        """Take in what a part of that weight has left, after parts of weight_before in all."""
        if self._mean is None and not self.is_changed:
            return
        now = self._now
        if now is None:
            return  # a cache that the part has cleared; `commit` puts it back
        if not now.is_floating_point() or now.shape != self.before.shape:
            self._last = now.detach().clone()
        elif self._mean is None:
            self._mean = self.mean(weight_before).add_(now, alpha=weight)
        else:
            self._mean.add_(now, alpha=weight)

    @torch.no_grad()
    def mean(self, weight: float) -> Tensor:
        """Sum of weight * b_p over the parts so far, of that weight in all."""
        if self._mean is not None:
            return self._mean
        wide = torch.promote_types(self.before.dtype, torch.float32)
        if weight == 0:
            return torch.zeros_like(self.before, dtype=wide)
        return self.before.to(wide) * weight

    def outcome(self, group: ProcessGroup | None) -> Tensor | bool:
        """What the others need to know: whether it changed, or its value where it has no mean."""
        if self._last is None:
            return self._mean is not None
        return self._last if group is None else self._last.cpu()

    @property
    def _now(self) -> Tensor | None:
        return self._module._buffers.get(self._name)


def _same(now: Tensor, before: Tensor) -> bool:
    """Equality, nan being equal to nan."""
    if torch.equal(now, before):
        return True
    return bool(((now == before) | (now.isnan() & before.isnan())).all())
