"""Detect what a forward pass writes into: its batch, and parameters.

    version(t)    torch counts the writes into each tensor; views share the count of their base

A forward pass may run twice over one batch: for a reduction in two passes, or again after a draw
of random numbers has been detected. A pass that writes into its batch then gets a copy of it.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from anybatch.errors import ModelError
from anybatch.pytree import Shared, Uncollated, is_flat, list_leaves, map_leaves

__all__ = ["Writes", "copy_batch", "rebuild_containers", "sum_versions"]


class Writes:
    """Record of the writes of the forward passes of one update.

    Args:
        parameters: those of the model, by name.
        share: the examples of the update; all micro-batches use its `Shared` leaves.
        allowed: names of parameters that may be written into, since that was found to be exact.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], share: Any, allowed: Collection[str] = ()
    ) -> None:
        self._parameters = parameters
        if allowed:
            self.allow(allowed)
        is_plain = is_flat(share) or isinstance(share, Uncollated)
        self._shared = [] if is_plain else _list_shared(share)
        self.is_cut = False
        """Whether more than one forward pass takes part in the update."""
        self.has_changed_batch = False
        """Whether a pass has written into a batch of which it had no copy."""

    def allow(self, names: Collection[str]) -> None:
        """Allow forward passes to write into parameters of these names."""
        self._parameters = {n: p for n, p in self._parameters.items() if n not in names}

    def begin(self, batch: Any, *, is_copy: bool) -> None:
        """Note the versions of all tensors before a forward pass."""
        self._leaves = [] if is_copy else list_leaves(batch)
        self._before = sum_versions(self._leaves)
        if self.is_cut:
            self._shared_before = sum_versions(self._shared)
            self._parameters_before = sum_versions(self._parameters.values())

    def end(self) -> None:
        """Compare the versions after the forward pass.

        Raises:
            ModelError: a write that makes the update depend on how the batch is cut.
        """
        if sum_versions(self._leaves) != self._before:
            self.has_changed_batch = True
        self._leaves = []
        if not self.is_cut:
            return
        if sum_versions(self._shared) != self._shared_before:
            raise ModelError(
                "The forward pass writes into an ab.Shared leaf of its batch, and the next "
                "micro-batch would get what it left there. Change a copy: write "
                "mask = mask * 2 in place of mask.mul_(2)."
            )
        if sum_versions(self._parameters.values()) != self._parameters_before:
            names = ", ".join(self._parameters)[:200]
            raise ModelError(
                f"The forward pass changes a parameter of the model (one of {names}). The batch is "
                f"cut into several forward passes, and each would run with other weights. "
                f"Initialise from data, or clip weights, before training or between updates; or "
                f"run the batch uncut."
            )

    def check_repeatable(self) -> None:
        """Refuse to run a forward pass again over a batch that it has changed.

        Raises:
            ModelError: it has changed its batch.
        """
        if self.has_changed_batch:
            raise ModelError(
                "The forward pass writes into its batch in place, and has to run over it a second "
                "time. The second pass would see other data. Change a copy: write x = x * 2 in "
                "place of x.mul_(2), and labels = labels - 1 in place of labels -= 1."
            )


def sum_versions(tensors: Iterable[Any]) -> int:
    """Sum the version counts of tensors; the sum grows if one of them is written into."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor) and not t.is_inference():
            total += t._version
    return total


def copy_batch(batch: Any) -> Any:
    """Copy a batch: its tensors, arrays and other leaves."""
    return map_leaves(_copy_leaf, batch)


def rebuild_containers(batch: Any) -> Any:
    """Rebuild the dicts and lists of a batch around the same leaves.

    An example loss may take an entry out of its batch (`batch.pop("labels")`).
    """
    return batch if is_flat(batch) else map_leaves(lambda leaf: leaf, batch)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):  # a tensor with a graph cannot be written into
        return leaf if leaf.requires_grad else leaf.clone()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object that cannot be copied is not watched either
        return leaf


def _list_shared(share: Any) -> list[Tensor]:
    shared = [leaf.leaf for leaf in list_leaves(share) if isinstance(leaf, Shared)]
    return [leaf for leaf in list_leaves(shared) if isinstance(leaf, Tensor)]
