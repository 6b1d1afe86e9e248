"""Buffers of a model, such as running statistics: one update a batch, whatever the layout.

    b' = sum over parts (n_p / B) * b_p,    each part p starting from b, summed pairwise

Where a layer computes b_p = (1 - m) b + m s_p, this is one update with the count-weighted mean
of the statistics s_p. A cache, whose shape changes, stays as the last part leaves it. Integers have
no mean: a counter of updates is the same after each part, and one that differs is refused. Whether
other buffers, such as codebooks, are right under this rule is seen by `self_check`. A buffer that
no part changes keeps its bits.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.distributed import ProcessGroup
from anybatch.errors import ModelError
from anybatch.gradient import pairwise_sum
from anybatch.gradient.pairwise_sum import Node
from anybatch.layout import GrainRange, MicroBatch

__all__ = ["Buffers"]


class Buffers:
    """The buffers of a model during one update."""

    def __init__(
        self,
        held: Iterable[tuple[nn.Module, str, Tensor]],
        runs: Sequence[GrainRange] | None = None,
    ) -> None:
        """Take the buffers by the module and name that hold them.

        Args:
            runs: the grains of each rank where the parts are grains, which are then added up in
                the order of `tree`, the same bits for any number of ranks.
        """
        self._all = [_Buffer(*one) for one in held]
        self._runs = runs
        self._parts: list[Node[float]] = []  # those so far: which it was, and its weight

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

    def replace(self) -> None:
        """Put copies in the place of the buffers, until `restore`."""
        for buffer in self._all:
            buffer.replace()

    def collect(self, part: MicroBatch, weight: float) -> None:
        """Take in what a part has left, with its weight n_p / B."""
        index = len(self._parts) if self._runs is None else part.grain
        assert index is not None
        now = Node(index, 0, weight)
        for buffer in self._all:
            buffer.collect(now, self._parts)
        self._parts.append(now)

    def commit(self, group: ProcessGroup | None) -> None:
        """Set what any part has changed to the weighted mean over the parts of all ranks."""
        if not self._all:
            return
        told = distributed.all_gather_object(lambda: [b.outcome(group) for b in self._all], group)
        averaged = []
        for buffer, *outcomes in zip(self._all, *told, strict=True):
            last = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
            if last:
                if not all(_fits(last[0], other) for other in last):
                    raise buffer.mistake()
                buffer.set(last[-1])
            elif any(outcomes):
                averaged.append(buffer)
            elif buffer.is_changed:  # by a backward pass, or a forward pass that does not count
                buffer.set(buffer.before)
        for buffer, mean in zip(averaged, self._means(averaged, group), strict=True):
            buffer.set(mean)

    @torch.no_grad()
    def _means(self, averaged: Sequence["_Buffer"], group: ProcessGroup | None) -> list[Tensor]:
        """Sum of weight * b_p over the parts of all ranks."""
        nodes = [buffer.sums(self._parts) for buffer in averaged]
        like = [buffer.before.to(_wide(buffer.before)) for buffer in averaged]
        if self._runs is None:
            pairs = zip(nodes, like, strict=True)
            means = [
                pairwise_sum.sum_nodes(n, Tensor.add_) if n else zero.mul(0) for n, zero in pairs
            ]
            distributed.all_reduce_sum(means, group)
            return means
        together = [
            Node(same[0].first, same[0].level, [node.value for node in same])
            for same in zip(*nodes, strict=True)
        ]
        return pairwise_sum.sum_over_ranks(together, self._runs, like, group) if averaged else []


class _Buffer:
    """One buffer of one module, which forward passes change in place or replace."""

    def __init__(self, module: nn.Module, name: str, own: Tensor) -> None:
        self._module, self._name, self._own = module, name, own
        self.before = own.detach().clone()
        self._version = _version_of(own)
        self._sums: list[Node[Tensor]] | None = None  # of weight * b_p, None before any change
        self._last: Tensor | None = None  # what a part has left that has no mean

    @property
    def is_changed(self) -> bool:
        """Whether it is other than before; a change through `.data` leaves the version as it is."""
        if self._now is not self._own or _version_of(self._own) != self._version:
            return True
        return not _same(self._own, self.before)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Give it a value, in the tensor that it was where the shape allows."""
        if value.shape == self._own.shape:
            self._own.copy_(value)
            self._version = _version_of(self._own)
            if self._now is not self._own:
                self._module._buffers[self._name] = self._own
        else:
            self._module._buffers[self._name] = value.to(self._own.device)

    def replace(self) -> None:
        """Put a copy in its place."""
        self._module._buffers[self._name] = self.before.clone()

    @torch.no_grad()
    def collect(self, part: Node[float], earlier: Sequence[Node[float]]) -> None:
        """Take in what a part has left, after others.

        Raises:
            ModelError: integers that differ between parts.
        """
        if self._sums is None and not self.is_changed:
            return
        now = self._now
        if now is None:
            return  # a cache that the part has cleared; `commit` puts it back
        if not (now.is_floating_point() or now.is_complex()) or now.shape != self.before.shape:
            if earlier and not _fits(now, self.before if self._last is None else self._last):
                raise self.mistake()
            self._last = now.detach().clone()
        else:
            self._sums = _appended(self.sums(earlier), part, now)

    def mistake(self) -> ModelError:
        """Make the error that names a buffer without a mean."""
        return ModelError(
            f"The buffer {self._name!r} of a {type(self._module).__name__} differs between the "
            f"parts of a batch, and integers and caches have no mean. After a whole batch it would "
            f"hold another value. Count updates, not examples, or count them outside of the "
            f"model; or run the batch uncut."
        )

    @torch.no_grad()
    def sums(self, parts: Iterable[Node[float]]) -> list[Node[Tensor]]:
        """Of weight * b_p over these parts, all there have been so far, as `tree` holds them."""
        if self._sums is None:
            sums: list[Node[Tensor]] = []
            for part in parts:
                sums = _appended(sums, part, self.before)
            return sums
        return self._sums

    def outcome(self, group: ProcessGroup | None) -> Tensor | bool:
        """What the others need to know: whether it changed, or its value where it has no mean."""
        if self._last is None:
            return self._sums is not None
        return self._last if group is None else self._last.cpu()

    @property
    def _now(self) -> Tensor | None:
        held = self._module._buffers
        # That of a scripted module has no `get`.
        return held[self._name] if self._name in held else None  # noqa: SIM401


def _appended(sums: Sequence[Node[Tensor]], part: Node[float], b: Tensor) -> list[Node[Tensor]]:
    return pairwise_sum.append_node(
        sums, Node(part.first, 0, b.to(_wide(b)) * part.value), Tensor.add_
    )


def _fits(now: Tensor, other: Tensor) -> bool:
    """Tell whether two parts leave the same; caches of other shapes have nothing to compare."""
    return now.shape != other.shape or torch.equal(now.cpu(), other.cpu())


def _version_of(b: Tensor) -> int | None:
    """Number of writes to a tensor; None where torch does not count them."""
    return None if b.is_inference() else b._version


def _wide(b: Tensor) -> torch.dtype:
    return torch.promote_types(b.dtype, torch.float32)


def _same(now: Tensor, before: Tensor) -> bool:
    """Equality, nan being equal to nan."""
    if torch.equal(now, before):
        return True
    return bool(((now == before) | (now.isnan() & before.isnan())).all())
