"""Inputs and targets in memory, checked before they train anything."""

from pathlib import Path
from typing import Any, NamedTuple, Self
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anybatch.errors import DataError
from anybatch.limits import check_unpacked
from anybatch.paths import check_local

__all__ = ["Examples", "check_classes", "load_npz"]


class Examples(NamedTuple):
    """N examples in memory."""

    inputs: Tensor  # [N, ...] of floats, or of int64 token ids
    targets: Tensor  # [N] of int64 classes, or [N, ...] of numbers
    weights: Tensor | None = None  # [N] of floats >= 0, the weight of each example; None: 1

    @classmethod
    def from_arrays(
        cls,
        inputs: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        tokens: bool = False,
    ) -> Self:
        """Convert arrays to float inputs or token ids, and int64 classes or float targets.

        Floats keep their width, at least float32. Integer inputs become float32, or int64 if they
        are tokens.

        >>> from anybatch.data import Examples
        >>> examples = Examples.from_arrays([[0, 1], [2, 3], [4, 5]], targets=[0, 1, 0])
        >>> examples.inputs.dtype, examples.targets.dtype
        (torch.float32, torch.int64)

        Raises:
            DataError: no examples, lengths that differ, NaN or infinite values, or types other than
                numbers; tokens that are no integers of at least 0; weights below 0, or all 0.
        """
        x, y = _convert("inputs", inputs, integers=tokens), _convert("targets", targets)
        if tokens and (x.is_floating_point() or (x < 0).any()):
            problem = str(x.dtype)[6:] if x.is_floating_point() else "below 0"
            raise DataError(f"inputs are {problem}. Token ids must be integers of at least 0.")
        if len(x) != len(y):
            raise DataError(
                f"There are {len(x)} inputs and {len(y)} targets. There must be one target for "
                f"each input, both with the examples first. Are rows missing, or is one transposed?"
            )
        if not len(x):
            raise DataError(
                "The data set is empty. It must hold at least one example. Is it the right file, "
                "or did a filter drop all of it?"
            )
        w = None if weights is None else _convert_weights(weights, len(x))
        return cls(x, y if y.is_floating_point() else y.long(), w)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All examples as a batch: (inputs, targets), and weights if there are any."""
        both = self.inputs, self.targets
        return both if self.weights is None else (*both, self.weights)

    @property
    def collate(self) -> None:
        """None: a batch is made by index."""

    def to(self, dtype: torch.dtype) -> "Examples":
        """Cast all floats to another dtype.

        Raises:
            DataError: a value is too large for it.
        """
        return Examples(
            *(
                _cast(name, column, dtype)
                for name, column in zip(self._fields, self.columns, strict=False)
            )
        )

    def select(self, ids: Tensor) -> "Examples":
        """Select the examples of these ids."""
        return Examples(*(column[ids] for column in self.columns))


def load_npz(
    path: str,
    inputs: str = "inputs",
    targets: str = "targets",
    weights: str | None = None,
    scale: float | None = None,
) -> Examples:
    """Load arrays of a NumPy .npz file.

    Bytes of three or more dimensions are images: [N, H, W] gets a channel, [N, H, W, 3] becomes
    [N, 3, H, W], and values are divided by 255, as in `load_idx`.

    Args:
        path: the file.
        inputs, targets, weights: names of the arrays in it.
        scale: divisor of the inputs; by default 255 for images of bytes, otherwise 1.

    Raises:
        DataError: a file that is missing, damaged, pickled, or lacks an array.
    """
    check_local(path, "a .npz file", DataError)
    if not Path(path).is_file():
        raise DataError(
            f"{path} is no file. Name a .npz file of NumPy arrays. A relative path starts at the "
            f"current folder."
        )
    try:
        with ZipFile(path) as packed:
            unpacked = sum(member.file_size for member in packed.infolist())
        check_unpacked(path, Path(path).stat().st_size, unpacked, DataError)
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive)
            arrays = {name: archive[name] for name in (inputs, targets, weights) if name in names}
    except DataError:
        raise
    except Exception as error:  # damaged files may raise anything
        raise DataError(
            f"{path} is no readable .npz file of plain arrays: {error}. Write it with numpy.savez; "
            f"arrays of objects are never unpickled."
        ) from error
    for key, name in (("inputs", inputs), ("targets", targets), ("weights", weights)):
        if name is not None and name not in arrays:
            raise DataError(
                f"{path} has no array {name!r}. It has {sorted(names)}. Name the right one: "
                f"data.args.{key} = '...'."
            )
    return Examples.from_arrays(
        _images(arrays[inputs], scale), arrays[targets], arrays.get(weights)
    )


def _images(values: NDArray[Any], scale: float | None) -> NDArray[Any]:
    """Return inputs divided by the scale, with images of bytes as [N, C, H, W]."""
    if scale is not None and not 0 < scale < float("inf"):
        raise DataError(f"data.args.scale = {scale}. It must be a number above 0 to divide by.")
    if values.dtype == np.uint8 and values.ndim >= 3:
        scale = 255 if scale is None else scale
        if values.ndim == 3:
            values = values[:, None]
        elif values.ndim == 4 and values.shape[3] in (1, 3, 4) and values.shape[1] > 4:
            values = values.transpose(0, 3, 1, 2)
    if scale in (None, 1) or values.dtype.kind not in "iuf":
        return values
    floats = values.astype(np.result_type(values.dtype, np.float32))
    floats /= np.asarray(scale, floats.dtype)
    return floats


def check_classes(targets: Tensor, num_classes: int) -> Tensor:
    """Return targets as int64 classes [N].

    Raises:
        DataError: floats, another shape than [N], or a class outside 0 .. num_classes - 1.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        raise DataError(
            f"Class labels are {str(targets.dtype)[6:]} of shape {tuple(targets.shape)}. They must "
            f"be integers of shape ({len(targets)},). Convert floats by astype(int), and one-hot "
            f"rows by argmax(1)."
        )
    outside = ((targets < 0) | (targets >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0, 0])
        raise DataError(
            f"The label of example {row} is {int(targets[row])}. Labels must be 0 to "
            f"{num_classes - 1}, since the model has {num_classes} outputs. Do the labels begin at "
            f"1, or has the model too few classes?"
        )
    return targets.long()


def _convert(name: str, values: ArrayLike, *, integers: bool = True) -> Tensor:
    """Convert floats to float32 or float64, integers to int64 or, without `integers`, float32."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} cannot become one array: {error}. Each example must have numbers of one shape."
        ) from error
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} are {array.dtype} of shape {array.shape}. They must be numbers with the "
            f"examples first. Convert text labels to integers: "
            f"numpy.unique(labels, return_inverse=True)."
        )
    if array.dtype.kind == "f":
        _check_finite(name, array)
        return torch.from_numpy(array.astype(np.float64 if array.itemsize >= 8 else np.float32))
    if not integers:
        return torch.from_numpy(array.astype(np.float32))
    if array.size and array.dtype == np.uint64 and array.max() >= 2**63:
        raise DataError(f"{name} hold {array.max()}. Integers must be below 2^63.")
    return torch.from_numpy(array.astype(np.int64))


def _convert_weights(values: ArrayLike, num_examples: int) -> Tensor:
    """Convert sample weights [N], and check them."""
    weights = _convert("weights", values, integers=False)
    if weights.shape != (num_examples,):
        raise DataError(
            f"weights are of shape {tuple(weights.shape)}. There must be one number for each "
            f"example: ({num_examples},)."
        )
    if (negative := (weights < 0).nonzero()).numel():
        row = int(negative[0, 0])
        raise DataError(
            f"The weight of example {row} is {weights[row].item():g}. It must be at least 0. Drop "
            f"the example, or give it the weight 0."
        )
    if not weights.any():
        raise DataError(
            "All weights are 0. At least one must be above 0, or no example counts. Is it the "
            "right column?"
        )
    return weights


def _check_finite(name: str, array: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise DataError(
            f"{name} hold {array[tuple(bad[0])]} in example {bad[0][0]}. All must be finite. "
            f"Correct or drop such examples; there are {len({int(row[0]) for row in bad})}."
        )


def _cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    if not values.is_floating_point() or values.dtype == dtype:  # finite, by `Examples.from_arrays`
        return values
    cast = values.to(dtype)
    low, high = cast.aminmax() if cast.numel() else (cast.new_zeros(()), cast.new_zeros(()))
    if not (low.isfinite() and high.isfinite()):  # `isfinite` of all values would copy them
        place = tuple((~cast.isfinite()).nonzero()[0].tolist())
        raise DataError(
            f"{name} hold {values[place].item():g} in example {place[0]}. {dtype} cannot hold it. "
            f"Scale them, or set run.dtype = 'float64'."
        )
    return cast
