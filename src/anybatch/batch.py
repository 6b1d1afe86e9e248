"""Batches of ragged sequences, padded to one length.

Sequences s_1 .. s_B of lengths T_i become one tensor, with a mask of what is not padding:

    values[i, t] = s_i[t],  mask[i, t] = (t < T_i),    t = 0 .. T-1,  T = max T_i
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anybatch import pytree
from anybatch.errors import BatchError

__all__ = ["Pad", "Padded", "get_inputs", "is_count", "is_number"]


class Padded(NamedTuple):
    """Sequences of different lengths in one tensor, with the mask of their values.

    Example:
        >>> padded, targets = Pad()([(torch.ones(2), 0), (torch.ones(1), 1)])
        >>> (padded.values * padded.mask).sum(1) / padded.mask.sum(1)
        tensor([1., 1.])
    """

    values: Tensor  # [B, T, ...]
    mask: Tensor  # [B, T], True for the values of each sequence, False for padding


@dataclass(frozen=True, slots=True)
class Pad:
    """Collate function for ragged sequences: pads to the longest of each micro-batch.

    An example is (sequence, target), perhaps with a sample weight as a third. A sequence is
    [T_i, ...]. Targets have one shape in all examples, or one value for each value of the
    sequence; the latter are padded too.

    Args:
        fill: what sequences are padded with. No loss may depend on it: see `Padded`.
        targets: what targets are padded with; torch's losses ignore -100.

    Example:
        >>> padded, targets = Pad()([(torch.tensor([1, 2]), 0), (torch.tensor([3]), 1)])
        >>> padded.values.tolist(), padded.mask.tolist(), targets.tolist()
        ([[1, 2], [3, 0]], [[True, True], [True, False]], [0, 1])
    """

    fill: float = 0
    targets: float = -100

    def __call__(self, examples: Sequence[Any]) -> tuple[Any, ...]:
        """Return (Padded, targets), or (Padded, targets, weights).

        Raises:
            BatchError: examples of another form, an empty sequence, or shapes that do not fit.
        """
        try:
            for example in examples:
                if not isinstance(example, tuple | list):
                    raise TypeError(f"an example is a {type(example).__name__}")
            columns = zip(*examples, strict=True)
            sequences, *others = [[_to_tensor(x) for x in column] for column in columns]
            lengths = [len(s) for s in sequences]
            values = pad_sequence(sequences, True, self.fill)
            stacks = [self._stack(column, lengths) for column in others]
        except (TypeError, ValueError, RuntimeError) as error:
            raise BatchError(
                f"ab.Pad expects examples (sequence, target) or (sequence, target, weight) of "
                f"tensors that differ in the length of the sequence alone: {error}. Write a "
                f"collate function for other examples."
            ) from error
        if 0 in lengths:
            raise BatchError(
                f"Example {lengths.index(0)} of a micro-batch is an empty sequence. A sequence "
                f"must have at least one value. Drop it: there is nothing to learn from."
            )
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return Padded(values, mask.to(values.device)), *stacks

    def _stack(self, column: list[Tensor], lengths: list[int]) -> Tensor:
        # If all lengths are equal, other targets may look like sequences. Both ways then agree.
        if [len(x) if x.ndim else 0 for x in column] == lengths:
            return pad_sequence(column, True, self.targets)
        return torch.stack(column)


def _to_tensor(values: Any) -> Tensor:
    return torch.as_tensor(pytree.to_native(values) if isinstance(values, np.ndarray) else values)


def get_inputs(batch: Any) -> Any:
    """Return what the model is called with: the first of (inputs, targets), or the whole batch."""
    return batch[0] if isinstance(batch, tuple | list) and not isinstance(batch, Padded) else batch


def is_count(n: Any) -> bool:
    """Return whether n is a number of examples: an integer of at least 1, NumPy's included."""
    return not isinstance(n, bool) and isinstance(n, Integral) and int(n) >= 1


def is_number(x: Any) -> bool:
    """Return whether x is a real number of Python or NumPy, neither a bool nor a tensor."""
    return isinstance(x, Real) and not isinstance(x, bool | np.bool_)
