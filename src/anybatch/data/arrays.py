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
    weights: Tensor | None = None  # [N] of floats >= 0, what each example counts; None: 1

    @classmethod
    def of(
        cls,
        inputs: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        tokens: bool = False,
    ) -> Self:
        """Tensors from arrays: float inputs or token ids, int64 classes or float targets.

        Floats keep their width, at least float32; integer inputs become float32, or int64 where
        they are tokens.

        Raises:
            DataError: no examples, lengths that differ, NaN or infinite values, or types that
                are no numbers; tokens that are no integers from 0 on; weights below 0, or all 0.
        """
        x, y = _numbers("inputs", inputs, integers=tokens), _numbers("targets", targets)
        if tokens and (x.is_floating_point() or (x < 0).any()):
            came = "below 0" if not x.is_floating_point() else str(x.dtype).removeprefix("torch.")
            raise DataError(f"inputs are {came}, expected token ids: integers from 0 on.")
        if len(x) != len(y):
            raise DataError(
                f"{len(x)} inputs and {len(y)} targets, expected one target an input, both with "
                f"the examples first. Are rows missing, or is one of them transposed?"
            )
        if not len(x):
            raise DataError(
                "the data set is empty, expected at least one example. Is it the right file, or "
                "did a filter drop everything?"
            )
        w = None if weights is None else _weights(weights, len(x))
        return cls(x, y if y.is_floating_point() else y.long(), w)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """A batch of all examples, as losses take it: (inputs, targets), or with the weights."""
        both = self.inputs, self.targets
        return both if self.weights is None else (*both, self.weights)

    @property
    def collate(self) -> None:
        """Tensors are gathered by index."""

    def to(self, dtype: torch.dtype) -> "Examples":
        """The same with all floats in another dtype.

        Raises:
            DataError: a value that is too large for it.
        """
        return Examples(
            *(
                _cast(name, column, dtype)
                for name, column in zip(self._fields, self.columns, strict=False)
            )
        )

    def of_ids(self, ids: Tensor) -> "Examples":
        """The examples of these ids, in their order."""
        return Examples(*(column[ids] for column in self.columns))


def load_npz(
    path: str,
    inputs: str = "inputs",
    targets: str = "targets",
    weights: str | None = None,
    scale: float | None = None,
) -> Examples:
    """Arrays of a NumPy .npz file.

    Bytes of three or more dimensions are images: [N, H, W] gets a channel, [N, H, W, 3] becomes
    [N, 3, H, W], and values are divided by 255, as `load_idx` does it.

    Args:
        path: the file.
        inputs, targets, weights: names of the arrays in it.
        scale: what inputs are divided by; by default 255 for images of bytes, otherwise nothing.

    Raises:
        DataError: a file that is missing, damaged, pickled, or lacks an array.
    """
    check_local(path, "a .npz file", DataError)
    if not Path(path).is_file():
        raise DataError(
            f"{path} is no file, expected a .npz file of NumPy arrays. A relative path is looked "
            f"up from the folder that you are in."
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
    except Exception as error:  # the bytes may be anything, and so may what they raise
        raise DataError(
            f"{path} is no readable .npz file of plain arrays: {error}. Write it with numpy.savez; "
            f"arrays of objects are never unpickled."
        ) from error
    for key, name in (("inputs", inputs), ("targets", targets), ("weights", weights)):
        if name is not None and name not in arrays:
            raise DataError(
                f"{path} has no array {name!r}, it has {sorted(names)}. "
                f"Name the one that is meant: data.args.{key} = '...'."
            )
    return Examples.of(_images(arrays[inputs], scale), arrays[targets], arrays.get(weights))


def _images(values: NDArray[Any], scale: float | None) -> NDArray[Any]:
    """Inputs with images of bytes as [N, C, H, W], divided by the scale."""
    if scale is not None and not 0 < scale < float("inf"):
        raise DataError(f"data.args.scale = {scale}. It should be a number above 0 to divide by.")
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
    """Targets as int64 classes [N].

    Raises:
        DataError: floats, another shape than [N], or a class outside 0 .. num_classes - 1.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        came = str(targets.dtype).removeprefix("torch.")
        raise DataError(
            f"expected integer class labels of shape ({len(targets)},), got {came} of shape "
            f"{tuple(targets.shape)}. Floats become labels by astype(int), one-hot rows by "
            f"argmax(1)."
        )
    outside = ((targets < 0) | (targets >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0, 0])
        raise DataError(
            f"the label of example {row} is {int(targets[row])}, expected 0 to {num_classes - 1}: "
            f"the model has {num_classes} outputs. Do the labels begin at 1, or has the model too "
            f"few classes?"
        )
    return targets.long()


def _numbers(name: str, given: ArrayLike, *, integers: bool = True) -> Tensor:
    """Floats as floats; integers as int64 or, where they are not to stay, float32."""
    try:
        given = given.detach().cpu() if isinstance(given, Tensor) else given
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} cannot become one array: {error}. Expected numbers of one shape an example."
        ) from error
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} are {array.dtype} of shape {array.shape}, expected numbers with the examples "
            f"first. Map text labels to integers: numpy.unique(labels, return_inverse=True)."
        )
    if array.dtype.kind == "f":
        _refuse_non_finite(name, array)
        return torch.from_numpy(array.astype(np.float64 if array.itemsize >= 8 else np.float32))
    if not integers:
        return torch.from_numpy(array.astype(np.float32))
    if array.size and array.dtype == np.uint64 and array.max() >= 2**63:
        raise DataError(f"{name} hold {array.max()}, expected integers below 2^63.")
    return torch.from_numpy(array.astype(np.int64))


def _weights(given: ArrayLike, num_examples: int) -> Tensor:
    """Sample weights [N], checked."""
    weights = _numbers("weights", given, integers=False)
    if weights.shape != (num_examples,):
        raise DataError(
            f"weights are of shape {tuple(weights.shape)}, expected one number an example: "
            f"({num_examples},)."
        )
    if (negative := (weights < 0).nonzero()).numel():
        row = int(negative[0, 0])
        raise DataError(
            f"the weight of example {row} is {weights[row].item():g}, expected at least 0. "
            f"Drop the example, or give it the weight 0."
        )
    if not weights.any():
        raise DataError(
            "all weights are 0, expected at least one above: no example would count. Is it the "
            "right column?"
        )
    return weights


def _refuse_non_finite(name: str, array: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise DataError(
            f"{name} hold {array[tuple(bad[0])]} in example {bad[0][0]}, expected finite numbers. "
            f"Examples affected: {len({int(row[0]) for row in bad})}. Mend or drop them."
        )


def _cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    if not values.is_floating_point() or values.dtype == dtype:  # finite, by `Examples.of`
        return values
    cast = values.to(dtype)
    low, high = cast.aminmax() if cast.numel() else (cast.new_zeros(()), cast.new_zeros(()))
    if not (low.isfinite() and high.isfinite()):  # `isfinite` of all would take a copy
        too_large = (~cast.isfinite()).nonzero()
        place = tuple(too_large[0].tolist())
        raise DataError(
            f"{name} hold {values[place].item():g} in example {place[0]}, expected values that "
            f"{dtype} can hold. Scale them, or set run.dtype = 'float64'."
        )
    return cast
