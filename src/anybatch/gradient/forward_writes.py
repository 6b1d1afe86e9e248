"""Checks of what a forward pass writes into: its batch, and parameters.

    version(t)    torch counts the writes into each tensor; views share the count of their base

A forward pass may run twice over one batch: for a reduction in two passes, or again after a draw of
random numbers has been found. A pass that writes into its batch then gets a copy of it.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from anybatch.errors import ModelError
from anybatch.pytree import Shared, Uncollated, is_flat, list_leaves, map_leaves

__all__ = ["Writes", "copy_of", "fresh_containers", "versions"]


class Writes:
    """Record of the writes of the forward passes of one update.

    Args:
        parameters: those of the model, by name.
        share: the batch as it was given; its `Shared` leaves are those of all micro-batches.
        allowed: names of parameters that may be written into, since that was found to be exact.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], share: Any, *, allowed: Collection[str] = ()
    ) -> None:
        self._parameters = parameters
        if allowed:
            self.allow(allowed)
        self._shared = _shared_leaves(share)
        self.is_cut = False
        """Whether more than one forward pass takes part in the update."""
        self.has_changed_batch = False
        """Whether a pass has written into a batch that it was not given a copy of."""

    def allow(self, names: Collection[str]) -> None:
        """Let forward passes write into parameters of these names."""
        self._parameters = {n: p for n, p in self._parameters.items() if n not in names}

    def begin(self, piece: Any, *, is_copy: bool) -> None:
        """Note the versions of everything before a forward pass."""
        self._leaves = [] if is_copy else list_leaves(piece)
        self._before = versions(self._leaves)
        self._shared_before = versions(self._shared)
        self._parameters_before = versions(self._parameters.values())

    def end(self) -> None:
        """Compare the versions after the forward pass.

        Raises:
            ModelError: a write that makes the update depend on how the batch is cut.
        """
        if versions(self._leaves) != self._before:
            self.has_changed_batch = True
        self._leaves = []
        if not self.is_cut:
            return
        if versions(self._shared) != self._shared_before:
            raise ModelError(
                "The forward pass writes into an ab.Shared leaf of its batch, and the next "
                "micro-batch would get what it left there. Change a copy: write "
                "mask = mask * 2 in place of mask.mul_(2)."
            )
        if versions(self._parameters.values()) != self._parameters_before:
            raise ModelError(_WRITES_PARAMETERS.format(", ".join(self._parameters)[:200]))

    def check_repeatable(self) -> None:
        """Refuse to run a forward pass again over a batch that it has changed.

        Raises:
            ModelError: it has.
        """
        if self.has_changed_batch:
            raise ModelError(
                "The forward pass writes into its batch in place, and has to run over it a second "
                "time. The second pass would see other data. Change a copy: write x = x * 2 in "
                "place of x.mul_(2), and labels = labels - 1 in place of labels -= 1."
            )


_WRITES_PARAMETERS = (
    "The forward pass changes a parameter of the model (one of {}). The batch is cut into several "
    "forward passes, and each would run with other weights. Initialise from data, or clip weights, "
    "before training or between updates; or run the batch uncut."
)


def versions(tensors: Iterable[Any]) -> int:
    """Sum of the tensors' version counts; it grows whenever one of them is written into."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor) and not t.is_inference():
            total += t._version
    return total


def copy_of(piece: Any) -> Any:
    """Copy a batch: its tensors, arrays and whatever else it holds."""
    return map_leaves(_copy_leaf, piece)


def fresh_containers(piece: Any) -> Any:
    """Rebuild the dicts and lists of a batch around the same leaves.

    An example loss may take an entry out of its batch (`batch.pop("labels")`).
    """
    if is_flat(piece):
        return piece
    return map_leaves(lambda leaf: leaf, piece)


def _copy_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):  # one with a graph cannot be written into
        return leaf if leaf.requires_grad else leaf.clone()
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object that cannot be copied is not watched either
        return leaf


def _shared_leaves(share: Any) -> list[Tensor]:
    if isinstance(share, Uncollated) or is_flat(share):
        return []
    shared = [leaf.leaf for leaf in list_leaves(share) if isinstance(leaf, Shared)]
    return [leaf for leaf in list_leaves(shared) if isinstance(leaf, Tensor)]
