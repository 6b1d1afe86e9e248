"""Ragged sequences in memory: all values in one tensor, and where each sequence lies in it.

    s_i = values[starts_i : starts_i + lengths_i]

A map-style data set, whose examples `Pad` pads a micro-batch at a time.
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
    """N ragged sequences, with a target each or with a target for each of their values.

    An example is (sequence [T_i, ...], target), with its weight as a third where there are any.
    """

    values: Tensor  # [L, ...], floats or int64 token ids
    starts: Tensor  # [N] int64
    lengths: Tensor  # [N] int64, at least 1
    targets: Tensor | None = None  # [N, ...], one a sequence
    value_targets: Tensor | None = None  # [L, ...], one a value, where there are no targets
    weights: Tensor | None = None  # [N], what each example counts; None: 1
    fill: float = 0  # what stands in a sequence after its end, once padded
    vocabulary: bytes | str | None = None  # at place i the byte or the character with id i

    @classmethod
    def of(
        cls,
        sequences: Sequence[ArrayLike] | tuple[ArrayLike, ArrayLike],
        targets: Any,
        weights: ArrayLike | None = None,
        *,
        tokens: bool = False,
        target_each_value: bool = False,
        **others: Any,
    ) -> Self:
        """Sequences from arrays, checked and copied.

        Floats keep their width, at least float32; integers become float32, or int64 where they
        are tokens.

        Args:
            sequences: a list of arrays [T_i, ...]; or a pair (values [L, ...], offsets [N + 1]),
                as Arrow keeps lists: sequence i is values[offsets[i] : offsets[i + 1]].
            targets: [N, ...], one a sequence; or one a value, in either form of the sequences.
            weights: [N], sample weights.
            tokens: whether values are token ids, integers from 0 on.
            target_each_value: whether targets are one a value.
            others: fields such as `fill`.

        Raises:
            DataError: no sequence, an empty one, NaN or infinite values, lengths that do not fit,
                or what is no number.
        """
        values, offsets = _flat("sequences", sequences)
        lengths, each = np.diff(offsets), np.zeros(len(values))
        if target_each_value:
            each, ends = _flat("targets", targets)
            _check_lengths(np.diff(ends), lengths)
            targets = np.zeros(len(lengths))
        whole = Examples.of(lengths, targets, weights)
        flat = Examples.of(values, each, tokens=tokens)
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
        """What `steps` and `evaluate` take as data."""
        return self

    @property
    def whole_columns(self) -> dict[str, Tensor]:
        """All tensors by name, for a fingerprint of the data."""
        columns = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in columns.items() if isinstance(value, Tensor)}

    @property
    def collate(self) -> Pad:
        """What makes a batch of examples."""
        return Pad(fill=self.fill)

    def of_ids(self, ids: Tensor) -> Self:
        """The examples of these ids, in their order; values are not copied."""
        chosen: dict[str, Any] = {
            name: None if (column := getattr(self, name)) is None else column[ids]
            for name in ("starts", "lengths", "targets", "weights")
        }
        return replace(self, **chosen)

    def followed_by(self, other: Self) -> Self:
        """These sequences, then others with the same fields."""
        if self.vocabulary != other.vocabulary:
            raise DataError(
                "the two data sets number their tokens in another way. Use unit = 'bytes', whose "
                "numbers are the same for any text, or keep both in one file."
            )
        both: dict[str, Any] = {
            name: torch.cat([column, getattr(other, name)])
            for name, column in self.whole_columns.items()
        }
        both["starts"] = torch.cat([self.starts, other.starts + len(self.values)])
        return replace(self, **both)

    def to(self, dtype: torch.dtype) -> Self:
        """The same with all floats in another dtype.

        Raises:
            DataError: a value that is too large for it.
        """
        columns = ("values", "targets", "value_targets", "weights")
        cast: dict[str, Any] = {name: _cast(name, getattr(self, name), dtype) for name in columns}
        return replace(self, **cast)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """The examples of these ids; sequences are views of the values."""
        chosen = torch.as_tensor(ids)
        starts = self.starts[chosen].tolist()
        places = [
            slice(a, a + n) for a, n in zip(starts, self.lengths[chosen].tolist(), strict=True)
        ]
        columns: list[Any] = [[self.values[place] for place in places]]
        if self.value_targets is not None:
            columns.append([self.value_targets[place] for place in places])
        columns += [column[chosen] for column in (self.targets, self.weights) if column is not None]
        return list(zip(*columns, strict=True))


def _flat(what: str, given: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values [L, ...] and offsets [N + 1], checked."""
    try:
        if isinstance(given, tuple):
            values, offsets = map(_array, given)
        else:
            arrays = [_array(one) for one in given]
            offsets = np.cumsum([0, *map(len, arrays)])
            values = np.concatenate(arrays) if arrays else np.empty(0)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot become one array: {error}. Expected a list of arrays that differ in "
            f"their length alone, or a pair (values, offsets)."
        ) from error
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or not len(offsets):
        raise DataError(
            f"the offsets of {what} are {offsets.dtype} of shape {offsets.shape}, expected "
            f"integers: where each begins, and the end of the last."
        )
    if offsets[0] < 0 or offsets[-1] > len(values) or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"the offsets of {what} begin with {offsets[0]} and end with {offsets[-1]}, expected "
            f"them to rise from 0 to at most {len(values)}, the number of values. Do they belong "
            f"to other values?"
        )
    values, offsets = values[offsets[0] : offsets[-1]], offsets.astype(np.int64) - int(offsets[0])
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if len(empty):
        raise DataError(
            f"of the {what}, number {empty[0]} is empty ({len(empty)} in all), expected at least "
            f"one value in each. Drop them: there is nothing to learn from."
        )
    _refuse_non_finite(what, values, offsets)
    return values, offsets


def _check_lengths(found: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    if len(found) != len(lengths):
        raise DataError(
            f"{len(lengths)} sequences and targets of {len(found)}, expected targets of each."
        )
    wrong = np.flatnonzero(found != lengths)
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"sequence {row} has {lengths[row]} values and {found[row]} targets, expected one "
            f"target a value ({len(wrong)} sequences in all have not)."
        )


def _array(given: Any) -> NDArray[Any]:
    return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)


def _refuse_non_finite(what: str, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
    bad = np.argwhere(~np.isfinite(values)) if values.dtype.kind == "f" else np.empty((0, 1))
    if len(bad):
        place = int(bad[0, 0])
        row = int(np.searchsorted(offsets, place, "right")) - 1
        raise DataError(
            f"of the {what}, number {row} is not finite at place {place - offsets[row]}, expected "
            f"finite numbers. Places affected: {len(np.unique(bad[:, 0]))}. Mend or drop them."
        )


def _cast(name: str, column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if column is None or not column.is_floating_point():
        return column
    cast = column.to(dtype)
    if not cast.isfinite().all():
        raise DataError(
            f"{name} reach {column.abs().max().item():g}, expected what {dtype} can hold. Scale "
            f"them, or set run.dtype = 'float64'."
        )
    return cast
