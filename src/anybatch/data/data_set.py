"""Data sets of recipes: one interface for examples in memory, in files, or in user code.

| examples | kind |
|---|---|
| in memory, all of one shape | `Examples` |
| in files, read by row | `Stored` |
| in memory, ragged | `Sequences` |
| in any map-style data set, such as one of the user's | `MapStyle` |
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, default_collate

from anybatch._torch import tree_map
from anybatch.data.arrays import Examples
from anybatch.data.sequences import Sequences
from anybatch.data.stored import ConcatenatedRows
from anybatch.errors import DataError
from anybatch.examples import count_examples

__all__ = ["DataSet", "MapStyle", "as_data_set", "concatenate", "drop_weights", "move_to_device"]


class DataSet(Protocol):
    """N examples, their ids 0 .. N-1."""

    @property
    def targets(self) -> Tensor | None:
        """[N, ...], in memory; None if a target is known only after reading its example."""

    @property
    def columns(self) -> Any:
        """Data for `steps` and `evaluate`."""

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """Function that makes a batch of a list of examples; None: a batch is made by index."""

    def select(self, ids: Tensor) -> "DataSet":
        """Select the examples of these ids."""

    def to(self, dtype: torch.dtype) -> "DataSet":
        """Cast all floats to another dtype."""


@dataclass(frozen=True)
class MapStyle:
    """A map-style data set: `len(examples)` and `examples[i]`, an example as the loss takes it.

    An attribute `collate` of the data set, such as `ab.Pad()` for ragged sequences, makes a batch
    of a list of examples; floats are then cast when an example is read.
    """

    examples: Any
    dtype: torch.dtype = torch.float32
    collate_examples: Callable[[Any], Any] | None = None

    @property
    def targets(self) -> None:
        """None: examples are read only when they are needed."""

    @property
    def columns(self) -> Any:
        """Data set, which casts floats if it has a `collate` of its own."""
        return self.examples if self.collate_examples is None else _Cast(self.examples, self._cast)

    @property
    def collate(self) -> Callable[[Any], Any]:
        """Function of the data set, or by default torch's, which then casts all floats."""
        return self._stack if self.collate_examples is None else self.collate_examples

    def _stack(self, examples: list[Any]) -> Any:
        return tree_map(self._cast, default_collate(examples))

    def select(self, ids: Tensor) -> "MapStyle":
        """Select the examples of these ids."""
        return replace(self, examples=Subset(self.examples, ids.tolist()))

    def to(self, dtype: torch.dtype) -> "MapStyle":
        return replace(self, dtype=dtype)

    def _cast(self, leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self.dtype) if is_float else leaf


@dataclass(frozen=True)
class _Cast:
    """Data set that casts each example when it is read."""

    examples: Any
    cast: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return tree_map(self.cast, self.examples[index])


def as_data_set(loaded: Any, name: str) -> DataSet:
    """Return the result of a source or of a user's function as a data set.

    Args:
        loaded: a `DataSet`; a pair (inputs, targets) of arrays, or a triple with weights; or a
            map-style data set, perhaps with a `collate` of its own.
        name: of the source, for the message.

    Raises:
        DataError: none of these.
    """
    if all(hasattr(loaded, name) for name in ("targets", "columns", "select", "to")):
        data: DataSet = loaded
        return data
    if isinstance(loaded, tuple) and len(loaded) in (2, 3):
        return Examples.from_arrays(*loaded)
    if isinstance(loaded, Tensor | tuple | dict | nn.Module) or not hasattr(loaded, "__getitem__"):
        raise DataError(
            f"data {name!r} returned a {type(loaded).__name__}. It must return a pair (inputs, "
            f"targets) of arrays with the examples first, perhaps with weights as a third, or a "
            f"map-style data set: an object with a length and an index."
        )
    count_examples(loaded)  # refuses an iterable without a length
    collate = getattr(loaded, "collate", None)
    return MapStyle(loaded, collate_examples=collate if callable(collate) else None)


def move_to_device(data: DataSet, device: torch.device, free_bytes: int) -> DataSet:
    """Move examples to the model's device if they fit in half of its free memory.

    A batch is then made by index there, without a copy from the CPU.
    """
    if not isinstance(data, Examples) or device.type == "cpu":
        return data
    if sum(column.nbytes for column in data.columns) > free_bytes / 2:
        return data
    return Examples(*(column.to(device) for column in data.columns))


def drop_weights(data: DataSet) -> DataSet:
    """Return the data without sample weights: each example counts 1."""
    if isinstance(data, Examples):
        return data._replace(weights=None)
    unweighted: DataSet = replace(data, weights=None)  # type: ignore[type-var]
    return unweighted


def concatenate(first: DataSet, second: DataSet) -> DataSet:
    """Concatenate two data sets of the same kind.

    Raises:
        DataError: data of different kinds or shapes, or weights in only one of them.
    """
    if type(first) is not type(second):
        raise DataError(
            f"data.held_out loads {type(second).__name__}, and the other data are "
            f"{type(first).__name__}. Both must be of one kind. Load both in the same way."
        )
    if isinstance(first, MapStyle) and isinstance(second, MapStyle):
        return replace(first, examples=ConcatDataset([first.examples, second.examples]))
    if isinstance(first, Sequences) and isinstance(second, Sequences):
        _check_shapes(_sort_tensors(first), _sort_tensors(second))
        return first.concatenate(second)
    _check_shapes(first.columns, second.columns)
    pairs = zip(first.columns, second.columns, strict=True)
    columns = [
        torch.cat(pair) if isinstance(pair[0], Tensor) else ConcatenatedRows(*pair)
        for pair in pairs
    ]
    return type(first)(*columns)


def _sort_tensors(data: Sequences) -> list[Tensor]:
    return [data.all_columns[name] for name in sorted(data.all_columns)]


def _check_shapes(first: Iterable[Any], second: Iterable[Any]) -> None:
    """Refuse columns whose rows have other shapes."""
    shapes, others = (
        [tuple(c.shape[1:]) if isinstance(c, Tensor) else c.row for c in columns]
        for columns in (first, second)
    )
    if shapes != others:
        raise DataError(
            f"data.held_out loads examples of shapes {others}. They must have the shapes of the "
            f"other data, {shapes}."
        )
