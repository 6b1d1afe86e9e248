"""What recipes ask of data, wherever the examples are kept.

| kept | kind |
|---|---|
| in memory, all of one shape | `Examples` |
| in files, read by row | `Stored` |
| in memory, ragged | `Sequences` |
| in any map-style data set, of the user's for instance | `MapStyle` |
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
from anybatch.data.stored import JoinedRows
from anybatch.errors import DataError
from anybatch.training.batches import num_examples

__all__ = ["DataSet", "MapStyle", "as_data_set", "beside", "joined", "without_weights"]


class DataSet(Protocol):
    """N examples, their ids 0 .. N-1."""

    @property
    def targets(self) -> Tensor | None:
        """[N, ...], in memory; None where only reading an example tells its target."""

    @property
    def columns(self) -> Any:
        """What `steps` and `evaluate` take as data."""

    @property
    def collate(self) -> Callable[[Any], Any] | None:
        """What makes a batch of a list of examples; None where columns are gathered by index."""

    def of_ids(self, ids: Tensor) -> "DataSet":
        """The examples of these ids, in their order."""

    def to(self, dtype: torch.dtype) -> "DataSet":
        """The same with all floats in another dtype."""


@dataclass(frozen=True)
class MapStyle:
    """A map-style data set: `len(examples)` and `examples[i]`, an example as the loss takes it.

    If it has an attribute `collate`, such as `ab.Pad()` for ragged sequences, that makes a batch
    of a list of examples, and their floats are cast as they are read.
    """

    examples: Any
    dtype: torch.dtype = torch.float32
    own_collate: Callable[[Any], Any] | None = None

    @property
    def targets(self) -> None:
        """Unknown: examples are read when they are needed."""

    @property
    def columns(self) -> Any:
        """The data set."""
        return self.examples if self.own_collate is None else _Cast(self.examples, self._cast)

    @property
    def collate(self) -> Callable[[Any], Any]:
        """The data set's own; or else torch's default, with all floats in its dtype."""
        return self._stack if self.own_collate is None else self.own_collate

    def _stack(self, examples: list[Any]) -> Any:
        return tree_map(self._cast, default_collate(examples))

    def of_ids(self, ids: Tensor) -> "MapStyle":
        """See `DataSet`, as for the next."""
        return replace(self, examples=Subset(self.examples, ids.tolist()))

    def to(self, dtype: torch.dtype) -> "MapStyle":
        return replace(self, dtype=dtype)

    def _cast(self, leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self.dtype) if is_float else leaf


@dataclass(frozen=True)
class _Cast:
    """A data set whose examples are cast as they are read."""

    examples: Any
    cast: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return tree_map(self.cast, self.examples[index])


def as_data_set(loaded: Any, name: str) -> DataSet:
    """What a source or a user's function has given, as a data set.

    Args:
        loaded: a data set of ours; a pair (inputs, targets) or triple with weights, of arrays;
            or a map-style data set, perhaps with a `collate` of its own.
        name: of the source, for the message.

    Raises:
        DataError: none of these.
    """
    if all(hasattr(loaded, name) for name in ("targets", "columns", "of_ids", "to")):
        found: DataSet = loaded
        return found
    if isinstance(loaded, tuple) and len(loaded) in (2, 3):
        return Examples.of(*loaded)
    if isinstance(loaded, Tensor | tuple | dict | nn.Module) or not hasattr(loaded, "__getitem__"):
        raise DataError(
            f"data {name!r} gave a {type(loaded).__name__}, expected a pair (inputs, targets) of "
            f"arrays with the examples first, perhaps with weights as a third, or a map-style "
            f"data set: an object with a length and an index."
        )
    num_examples(loaded)  # refuses an iterable without a length
    collate = getattr(loaded, "collate", None)
    return MapStyle(loaded, own_collate=collate if callable(collate) else None)


def beside(data: DataSet, device: torch.device, free_bytes: int) -> DataSet:
    """The same on the device of the model, where they fit in half of what is free there: batches
    are then gathered by index without a copy from the CPU."""
    if not isinstance(data, Examples) or device.type == "cpu":
        return data
    if sum(column.nbytes for column in data.columns) > free_bytes / 2:
        return data
    return Examples(*(column.to(device) for column in data.columns))


def without_weights(data: DataSet) -> DataSet:
    """The same, each example counting 1."""
    if isinstance(data, Examples):
        return data._replace(weights=None)
    found: DataSet = replace(data, weights=None)  # type: ignore[type-var]
    return found


def joined(first: DataSet, second: DataSet) -> DataSet:
    """The examples of one data set, then those of another of the same kind.

    Raises:
        DataError: data of different kinds or shapes, or weights in one of them alone.
    """
    if type(first) is not type(second):
        raise DataError(
            f"the examples that data.held_out loads are {type(second).__name__}, and the others "
            f"are {type(first).__name__}. Both should be of one kind: load both in the same way."
        )
    if isinstance(first, MapStyle) and isinstance(second, MapStyle):
        return replace(first, examples=ConcatDataset([first.examples, second.examples]))
    if isinstance(first, Sequences) and isinstance(second, Sequences):
        _check_alike(_row_shapes(_parts(first)), _row_shapes(_parts(second)))
        return first.followed_by(second)
    _check_alike(_row_shapes(first.columns), _row_shapes(second.columns))
    pairs = zip(first.columns, second.columns, strict=True)
    columns = [
        torch.cat(pair) if isinstance(pair[0], Tensor) else JoinedRows(*pair) for pair in pairs
    ]
    return type(first)(*columns)


def _parts(data: Sequences) -> list[Tensor]:
    return [data.whole_columns[name] for name in sorted(data.whole_columns)]


def _row_shapes(columns: Iterable[Any]) -> list[tuple[int, ...]]:
    """Shape of a row of each column."""
    return [
        tuple(column.shape[1:]) if isinstance(column, Tensor) else column.row for column in columns
    ]


def _check_alike(first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> None:
    if first != second:
        raise DataError(
            f"the examples that data.held_out loads are of shapes {second}, expected "
            f"{first} as the others."
        )
