"""Buffers of a model, such as running statistics: one update per batch, whatever the layout.

    b' = sum over micro-batches m (n_m / B) * b_m,    each m starting from b, summed pairwise

If a layer computes b_m = (1 - a) b + a s_m, this is one update with the count-weighted mean of the
statistics s_m. A cache, whose shape changes, keeps the value of the last micro-batch. Integers have
no mean: a counter of updates is the same after each micro-batch, and one that differs is refused.
`self_check` tests whether this rule is right for other buffers, such as codebooks. A buffer that no
micro-batch changes keeps its bits.
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
    """Buffers of a model during one update.

    Args:
        buffers: each with the module and name that hold it.
        ranges: the grains of each rank, if micro-batches are grains. Buffers are then summed in
            the order of `pairwise_sum`, with the same bits for any number of ranks.
    """

    def __init__(
        self,
        buffers: Iterable[tuple[nn.Module, str, Tensor]],
        ranges: Sequence[GrainRange] | None = None,
    ) -> None:
        self._buffers = [_Buffer(*buffer) for buffer in buffers]
        self._ranges = ranges
        self._weights: list[Node[float]] = []  # of the micro-batches so far

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Take all buffers of a model."""
        return cls(
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        )

    def restore(self) -> None:
        """Restore the values from before the update."""
        for buffer in self._buffers:
            if buffer.is_changed:
                buffer.set(buffer.before)

    def replace(self) -> None:
        """Put copies in the place of the buffers, until `restore`."""
        for buffer in self._buffers:
            buffer.replace()

    def collect(self, micro_batch: MicroBatch, weight: float) -> None:
        """Collect what a micro-batch has left, with its weight n_m / B."""
        index = len(self._weights) if self._ranges is None else micro_batch.grain
        assert index is not None
        node = Node(index, 0, weight)
        for buffer in self._buffers:
            buffer.collect(node, self._weights)
        self._weights.append(node)

    def commit(self, group: ProcessGroup | None) -> None:
        """Set each buffer that has changed to its weighted mean over all ranks' micro-batches."""
        if not self._buffers:
            return
        per_rank = distributed.all_gather_object(
            lambda: [b.report(group) for b in self._buffers], group
        )
        to_average = []
        for buffer, *reports in zip(self._buffers, *per_rank, strict=True):
            last = [report for report in reports if isinstance(report, Tensor)]
            if last:
                if not all(_agree(last[0], other) for other in last):
                    raise buffer.make_error()
                buffer.set(last[-1])
            elif any(reports):
                to_average.append(buffer)
            elif buffer.is_changed:  # by a backward pass, or by a dummy forward pass
                buffer.set(buffer.before)
        for buffer, mean in zip(to_average, self._average(to_average, group), strict=True):
            buffer.set(mean)

    @torch.no_grad()
    def _average(self, buffers: Sequence["_Buffer"], group: ProcessGroup | None) -> list[Tensor]:
        """Sum weight * b_m over the micro-batches of all ranks."""
        if not buffers:
            return []
        per_buffer = [buffer.list_sums(self._weights) for buffer in buffers]
        like = [buffer.before.to(_wide(buffer.before)) for buffer in buffers]
        if self._ranges is None:
            means = [
                pairwise_sum.sum_nodes(nodes, Tensor.add_) if nodes else before.mul(0)
                for nodes, before in zip(per_buffer, like, strict=True)
            ]
            distributed.all_reduce_sum(means, group)
            return means
        nodes = [
            Node(same[0].first, same[0].level, [node.value for node in same])
            for same in zip(*per_buffer, strict=True)
        ]
        return pairwise_sum.sum_over_ranks(nodes, self._ranges, like, group)


class _Buffer:
    """One buffer of one module, which forward passes change in place or replace."""

    def __init__(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self._module, self._name, self._tensor = module, name, tensor
        self.before = tensor.detach().clone()
        self._version = _read_version(tensor)
        self._sums: list[Node[Tensor]] | None = None  # of weight * b_m; None: not changed yet
        self._last: Tensor | None = None  # value after the last micro-batch, if it has no mean

    @property
    def is_changed(self) -> bool:
        """Return whether it differs from before; `.data` changes a tensor but not its version."""
        if self._value is not self._tensor or _read_version(self._tensor) != self._version:
            return True
        return not _is_equal(self._tensor, self.before)

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Set its value, in the original tensor if the shape allows."""
        if value.shape == self._tensor.shape:
            self._tensor.copy_(value)
            self._version = _read_version(self._tensor)
            if self._value is not self._tensor:
                self._module._buffers[self._name] = self._tensor
        else:
            self._module._buffers[self._name] = value.to(self._tensor.device)

    def replace(self) -> None:
        """Put a copy in its place."""
        self._module._buffers[self._name] = self.before.clone()

    @torch.no_grad()
    def collect(self, weight: Node[float], earlier: Sequence[Node[float]]) -> None:
        """Collect what a micro-batch has left, after earlier ones.

        Raises:
            ModelError: integers that differ between micro-batches.
        """
        if self._sums is None and not self.is_changed:
            return
        value = self._value
        if value is None:
            return  # the micro-batch has cleared a cache; `commit` restores it
        has_mean = value.is_floating_point() or value.is_complex()
        if not has_mean or value.shape != self.before.shape:
            if earlier and not _agree(value, self.before if self._last is None else self._last):
                raise self.make_error()
            self._last = value.detach().clone()
        else:
            self._sums = _append(self.list_sums(earlier), weight, value)

    def make_error(self) -> ModelError:
        """Make the error that names a buffer without a mean."""
        return ModelError(
            f"The buffer {self._name!r} of a {type(self._module).__name__} differs between the "
            f"micro-batches of a batch, and integers and caches have no mean. After a whole batch "
            f"it would hold another value. Count updates, not examples, or count them outside of "
            f"the model; or run the batch uncut."
        )

    @torch.no_grad()
    def list_sums(self, weights: Iterable[Node[float]]) -> list[Node[Tensor]]:
        """List the nodes of sum weight * b_m; an unchanged buffer has b_m = b."""
        if self._sums is not None:
            return self._sums
        sums: list[Node[Tensor]] = []
        for weight in weights:
            sums = _append(sums, weight, self.before)
        return sums

    def report(self, group: ProcessGroup | None) -> Tensor | bool:
        """Return whether it has changed, or its last value if it has no mean."""
        if self._last is None:
            return self._sums is not None
        return self._last if group is None else self._last.cpu()

    @property
    def _value(self) -> Tensor | None:
        buffers = self._module._buffers
        # The dict of a scripted module has no `get`.
        return buffers[self._name] if self._name in buffers else None  # noqa: SIM401


def _append(sums: Sequence[Node[Tensor]], weight: Node[float], b: Tensor) -> list[Node[Tensor]]:
    node = Node(weight.first, 0, b.to(_wide(b)) * weight.value)
    return pairwise_sum.append_node(sums, node, Tensor.add_)


def _agree(value: Tensor, other: Tensor) -> bool:
    """Compare what two micro-batches leave; caches of different shapes always agree."""
    return value.shape != other.shape or torch.equal(value.cpu(), other.cpu())


def _read_version(b: Tensor) -> int | None:
    """Return the number of writes to a tensor; None: torch does not count them."""
    return None if b.is_inference() else b._version


def _wide(b: Tensor) -> torch.dtype:
    return torch.promote_types(b.dtype, torch.float32)


def _is_equal(value: Tensor, before: Tensor) -> bool:
    """Compare two tensors; nan equals nan."""
    if torch.equal(value, before):
        return True
    return bool(((value == before) | (value.isnan() & before.isnan())).all())
