"""What recipes ask of data, wherever the examples are kept.

| kept | kind |
|---|---|
| in memory, all of one shape | `Examples` |
| in files, read by row | `Stored` |
| in memory, ragged | `Sequences` |
| in any map-style data set, of the user's for instance | `MapStyle` |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Subset, default_collate

from anybatch.data.arrays import Examples
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
    """A map-style data set: `len(examples)` and `examples[i]`, an example as the loss takes it."""

    examples: Any
    dtype: torch.dtype = torch.float32

    @property
    def targets(self) -> None:
        """Unknown: examples are read when they are needed."""

    @property
    def columns(self) -> Any:
        """The data set."""
        return self.examples

    def collate(self, examples: list[Any]) -> Any:
        """Torch's default, with all floats in the data set's dtype."""
        return tree_map(self._cast, default_collate(examples))

    def of_ids(self, ids: Tensor) -> "MapStyle":
        """See `DataSet`, as for the next."""
        return replace(self, examples=Subset(self.examples, ids.tolist()))

    def to(self, dtype: torch.dtype) -> "MapStyle":
        return replace(self, dtype=dtype)

    def _cast(self, leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self.dtype) if is_float else leaf


def as_data_set(loaded: Any, name: str) -> DataSet:
    """What a source or a user's function has given, as a data set.

    Args:
        loaded: a data set of ours; a pair (inputs, targets) or triple with weights, of arrays;
            or a map-style data set.
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
    return MapStyle(loaded)


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
    """The examples of one data set, then those of another.

    Raises:
        DataError: data that are not in memory, or of different shapes.
    """
    if not (isinstance(first, Examples) and isinstance(second, Examples)):
        raise DataError(
            "data.held_out names other data to load, expected data in memory for that. Give the "
            "fraction to hold out instead, such as data.held_out = 0.2."
        )
    a, b = first.columns, second.columns
    shapes = [[tuple(column.shape[1:]) for column in columns] for columns in (a, b)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the examples that data.held_out loads are of shapes {shapes[1]}, expected "
            f"{shapes[0]} as the others."
        )
    return Examples(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
