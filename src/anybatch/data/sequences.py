"""Ragged sequences in memory: one tensor of all values, with the start and length of each.

    s_i = values[starts_i : starts_i + lengths_i]

They are a map-style data set; `Pad` pads the examples of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anybatch.batch import Pad
from anybatch.data.arrays import Examples
from anybatch.errors import DataError

__all__ = ["Sequences"]


@dataclass(frozen=True, eq=False, repr=False)
class Sequences:
    """N ragged sequences, with a target for each sequence or for each value.

    An example is (sequence [T_i, ...], target), and its weight if there are any.
    """

    values: Tensor  # [L, ...], floats or int64 token ids
    starts: Tensor  # [N] int64
    lengths: Tensor  # [N] int64, at least 1
    targets: Tensor | None = None  # [N, ...], one for each sequence
    value_targets: Tensor | None = None  # [L, ...], one for each value, if there are no targets
    weights: Tensor | None = None  # [N], the weight of each example; None: 1
    fill: float = 0  # value of padding
    vocabulary: bytes | str | None = None  # at place i the byte or the character with id i

    @classmethod
    def from_arrays(
        cls,
        sequences: Sequence[ArrayLike] | tuple[ArrayLike, ArrayLike],
        targets: Any,
        weights: ArrayLike | None = None,
        *,
        tokens: bool = False,
        target_each_value: bool = False,
        **others: Any,
    ) -> Self:
        """Copy and check arrays.

        Floats keep their width, at least float32. Integers become float32, or int64 if they are
        tokens.

        Args:
            sequences: a list of arrays [T_i, ...]; or a pair (values [L, ...], offsets [N + 1]),
                as Arrow stores lists: sequence i is values[offsets[i] : offsets[i + 1]].
            targets: [N, ...], one for each sequence; or one for each value, in either form of
                the sequences.
            weights: [N], sample weights.
            tokens: whether values are token ids, integers of at least 0.
            target_each_value: whether there is a target for each value.
            others: fields such as `fill`.

        Raises:
            DataError: no sequence, an empty one, NaN or infinite values, lengths that do not fit,
                or types other than numbers.
        """
        values, offsets = _flatten("sequences", sequences)
        lengths, each = np.diff(offsets), np.zeros(len(values))
        if target_each_value:
            each, ends = _flatten("targets", targets)
            _check_lengths(np.diff(ends), lengths)
            targets = np.zeros(len(lengths))
        whole = Examples.from_arrays(lengths, targets, weights)
        flat = Examples.from_arrays(values, each, tokens=tokens)
        return cls(
            values=flat.inputs,
            starts=torch.from_numpy(offsets[:-1].copy()),
            lengths=torch.from_numpy(lengths),
            targets=None if target_each_value else whole.targets,
            value_targets=flat.targets if target_each_value else None,
            weights=whole.weights,
            **others,
        )

    @property
    def columns(self) -> Self:
        """Data for `steps` and `evaluate`."""
        return self

    @property
    def all_columns(self) -> dict[str, Tensor]:
        """All tensors by name, for a fingerprint of the data."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in columns.items() if isinstance(value, Tensor)}

    @property
    def collate(self) -> Pad:
        """Function that makes a batch of a list of examples."""
        return Pad(fill=self.fill)

    def select(self, ids: Tensor) -> Self:
        """Select the examples of these ids; values are not copied."""
        columns: dict[str, Any] = {
            name: None if (column := getattr(self, name)) is None else column[ids]
            for name in ("starts", "lengths", "targets", "weights")
        }
        return replace(self, **columns)

    def concatenate(self, other: Self) -> Self:
        """Concatenate these sequences and others with the same fields."""
        if self.vocabulary != other.vocabulary:
            raise DataError(
                "The two data sets have different vocabularies. Use unit = 'bytes', whose ids are "
                "the same for any text, or put both into one file."
            )
        both: dict[str, Any] = {
            name: torch.cat([column, getattr(other, name)])
            for name, column in self.all_columns.items()
        }
        both["starts"] = torch.cat([self.starts, other.starts + len(self.values)])
        return replace(self, **both)

    def to(self, dtype: torch.dtype) -> Self:
        """Cast all floats to another dtype.

        Raises:
            DataError: a value is too large for it.
        """
        columns = ("values", "targets", "value_targets", "weights")
        cast: dict[str, Any] = {name: _cast(name, getattr(self, name), dtype) for name in columns}
        return replace(self, **cast)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Return the examples of these ids; sequences are views of the values."""
        rows = torch.as_tensor(ids)
        starts, lengths = self.starts[rows].tolist(), self.lengths[rows].tolist()
        places = [slice(a, a + n) for a, n in zip(starts, lengths, strict=True)]
        columns: list[Any] = [[self.values[place] for place in places]]
        if self.value_targets is not None:
            columns.append([self.value_targets[place] for place in places])
        columns += [column[rows] for column in (self.targets, self.weights) if column is not None]
        return list(zip(*columns, strict=True))


def _flatten(name: str, arrays: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return values [L, ...] and offsets [N + 1], checked."""
    try:
        if isinstance(arrays, tuple):
            values, offsets = map(_to_array, arrays)
        else:
            pieces = [_to_array(array) for array in arrays]
            offsets = np.cumsum([0, *map(len, pieces)])
            values = np.concatenate(pieces) if pieces else np.empty(0)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} cannot become one array: {error}. Pass a list of arrays that differ only in "
            f"their length, or a pair (values, offsets)."
        ) from error
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise DataError(
            f"The offsets of {name} are {offsets.dtype} of shape {offsets.shape}. They must be "
            f"integers: the start of each, and the end of the last."
        )
    if offsets[0] < 0 or offsets[-1] > len(values) or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"The offsets of {name} begin with {offsets[0]} and end with {offsets[-1]}. They must "
            f"rise from 0 to at most {len(values)}, the number of values. Do they belong to other "
            f"values?"
        )
    values, offsets = values[offsets[0] : offsets[-1]], offsets.astype(np.int64) - int(offsets[0])
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if len(empty):
        raise DataError(
            f"Number {empty[0]} of the {name} is empty ({len(empty)} in all). Each must hold at "
            f"least one value. Drop the empty ones."
        )
    _check_finite(name, values, offsets)
    return values, offsets


def _check_lengths(num_targets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    if len(num_targets) != len(lengths):
        raise DataError(
            f"There are {len(lengths)} sequences, and targets of {len(num_targets)}. Pass targets "
            f"of each."
        )
    wrong = np.flatnonzero(num_targets != lengths)
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"Sequence {row} has {lengths[row]} values and {num_targets[row]} targets. Each value "
            f"needs one target. This concerns {len(wrong)} sequences in all."
        )


def _to_array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _check_finite(name: str, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
    bad = np.argwhere(~np.isfinite(values)) if values.dtype.kind == "f" else np.empty((0, 1))
    if len(bad):
        place = int(bad[0, 0])
        row = int(np.searchsorted(offsets, place, "right")) - 1
        raise DataError(
            f"Number {row} of the {name} is not finite at place {place - offsets[row]}. All values "
            f"must be finite. Correct or drop them; there are {len(np.unique(bad[:, 0]))}."
        )


def _cast(name: str, column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if column is None or not column.is_floating_point():
        return column
    cast = column.to(dtype)
    if not cast.isfinite().all():
        raise DataError(
            f"{name} reach {column.abs().max().item():g}. {dtype} cannot hold that. Scale them, or "
            f"set run.dtype = 'float64'."
        )
    return cast
