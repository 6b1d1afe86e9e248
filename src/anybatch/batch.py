"""Batches as pytrees, and what the model yields for each example.

A batch is a tensor, an array, or any nesting of these, see `pytree`; each leaf has the examples
along its first dimension, `Shared` leaves excepted:

    size(batch) = B        take(batch, a, b) = examples a .. b-1 of every leaf

Ragged sequences s_1 .. s_B of lengths T_i become leaves by padding, with a mask beside them:

    values[i, t] = s_i[t],  mask[i, t] = (t < T_i),    t = 0 .. T-1,  T = max T_i
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anybatch import pytree
from anybatch.errors import BatchError
from anybatch.pytree import Shared, Uncollated, is_cut, leaves, map_leaves

__all__ = [
    "ExampleLosses",
    "Pad",
    "Padded",
    "Shared",
    "Uncollated",
    "inputs_of",
    "is_count",
    "is_number",
    "ready",
    "size",
    "take",
]


@dataclass(frozen=True, slots=True)
class ExampleLosses:
    """What the model yields for B examples.

    Args:
        values: [B], the loss of each example summed over its own terms (tokens, pixels);
            or [B, k], k numbers an example for a reduction that couples examples.
        counts: [B], how many terms (or how much weight) each value sums over; None: 1 each.
        groups: [B], integer group of each example, for `GroupDRO`.
        metrics: name to [B] of further figures, summed over the example's terms like the
            values; reported as their sum over the sum of counts. They take no part in the update.
    """

    values: Tensor
    counts: Tensor | None = None
    groups: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Tensor:
        """Counts as a tensor [B], ones where none were given."""
        if self.counts is None:
            return torch.ones(len(self.values), dtype=self.values.dtype, device=self.values.device)
        return self.counts

    @property
    def present(self) -> Tensor:
        """[B], True for the examples with n_i > 0, which alone take part."""
        return self.weights > 0

    @property
    def means(self) -> Tensor:
        """m_i = v_i / n_i, shaped like the values; 0 where n_i = 0."""
        n = self.weights.to(self.values.dtype)
        n = n if self.values.ndim == 1 else n[:, None]
        return torch.where(n > 0, self.values / n, 0)

    def map(self, change: Callable[[Tensor], Tensor]) -> "ExampleLosses":
        """The same with every tensor changed, such as detached or gathered."""
        return ExampleLosses(
            change(self.values),
            None if self.counts is None else change(self.counts),
            None if self.groups is None else change(self.groups),
            {name: change(metric) for name, metric in self.metrics.items()},
        )


class Padded(NamedTuple):
    """Ragged sequences side by side, and which of the values are theirs."""

    values: Tensor  # [B, T, ...]
    mask: Tensor  # [B, T], True at each sequence's own values, False where it is padded


@dataclass(frozen=True, slots=True)
class Pad:
    """A `collate` for ragged sequences: padded to the longest of each micro-batch.

    An example is (sequence, target), perhaps with a sample weight as a third. A sequence is
    [T_i, ...]; a target is of one shape in all examples, or has one value for each of the
    sequence's, and is then padded too.

    Args:
        fill: what stands in sequences after their end. No loss may depend on it: see `Padded`.
        targets: what stands in targets after their end; -100 is what torch's losses leave out.
    """

    fill: float = 0
    targets: float = -100

    def __call__(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """(Padded, targets), or (Padded, targets, weights).

        Raises:
            BatchError: examples of another form, an empty sequence, or shapes that do not fit.
        """
        try:
            for example in examples:
                if not isinstance(example, tuple | list):
                    raise TypeError(f"an example is a {type(example).__name__}")
            columns = zip(*examples, strict=True)
            sequences, *others = [[_as_tensor(x) for x in column] for column in columns]
            lengths = [len(s) for s in sequences]
            padded = pad_sequence(sequences, True, self.fill)
            stacked = [self._stacked(column, lengths) for column in others]
        except (TypeError, ValueError, RuntimeError) as error:
            raise BatchError(
                f"ab.Pad expects examples (sequence, target) or (sequence, target, weight) of "
                f"tensors that differ in the length of the sequence alone: {error}. Give what is "
                f"different a collate of your own."
            ) from error
        if 0 in lengths:
            raise BatchError(
                f"example {lengths.index(0)} of a micro-batch is an empty sequence, expected at "
                f"least one value. Drop it: there is nothing to learn from."
            )
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return Padded(padded, mask.to(padded.device)), *stacked

    def _stacked(self, column: list[Tensor], lengths: list[int]) -> Tensor:
        # Where all have one length, what is no sequence may look like one: it comes out the same.
        if [len(x) if x.ndim else 0 for x in column] == lengths:
            return pad_sequence(column, True, self.targets)
        return torch.stack(column)


def _as_tensor(values: Any) -> Tensor:
    return torch.as_tensor(pytree.native(values) if isinstance(values, np.ndarray) else values)


def inputs_of(batch: Any) -> Any:
    """What the model is called with: the first of (inputs, targets), as in the losses of ours."""
    return batch[0] if isinstance(batch, tuple | list) and not isinstance(batch, Padded) else batch


def is_count(n: Any) -> bool:
    """Whether n is a number of examples: an integer of at least 1, NumPy's included."""
    return not isinstance(n, bool) and isinstance(n, Integral) and int(n) >= 1


def is_number(x: Any) -> bool:
    """Whether x is a real number of Python or NumPy, neither a bool nor a tensor."""
    return isinstance(x, Real) and not isinstance(x, bool | np.bool_)


def size(batch: Any) -> int:
    """Number of examples of a batch.

    Raises:
        BatchError: it names leaves that disagree, or one without examples; or there is no leaf.
    """
    if isinstance(batch, Uncollated):
        return len(batch.examples)
    return pytree.length(batch)


def take(batch: Any, start: int, stop: int) -> Any:
    """Examples start .. stop-1 of a batch, as views where leaves allow; still a batch."""
    if isinstance(batch, Uncollated):
        return Uncollated(batch.examples[start:stop], batch.collate)
    return pytree.cut(batch, start, stop)


def repeat(batch: Any, example: int) -> Any:
    """Build a batch of the same shape in which every example is the one of that index."""
    if isinstance(batch, Uncollated):
        batch = batch.collate(batch.examples)
    places = [example] * size(batch)
    return map_leaves(lambda leaf: leaf[places] if is_cut(leaf) else leaf, batch)


def ready(batch: Any, device: torch.device | None = None) -> Any:
    """A batch as the model gets it: collated, `Shared` unwrapped, tensors on the device."""
    if isinstance(batch, Uncollated):
        batch = batch.collate(batch.examples)
    if all(_is_ready(leaf, device) for leaf in leaves(batch)):
        return batch
    return map_leaves(lambda leaf: _prepare(leaf, device), batch)


def _is_ready(leaf: Any, device: torch.device | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.device == device and not leaf.is_inference()


def _prepare(leaf: Any, device: torch.device | None) -> Any:
    """Unwrap a `Shared` leaf, move a tensor to the device, and let autograd save it."""
    if isinstance(leaf, Shared):
        return map_leaves(lambda inner: _prepare(inner, device), leaf.leaf)
    if not isinstance(leaf, Tensor):
        # An object of the user's own collate moves itself, such as a PackedSequence or a graph.
        return leaf.to(device) if device is not None and hasattr(leaf, "to") else leaf
    if device is not None and leaf.device != device:
        leaf = leaf.to(device, non_blocking=True)
    return leaf.clone() if leaf.is_inference() and not torch.is_inference_mode_enabled() else leaf
