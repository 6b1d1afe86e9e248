"""Inputs and targets in memory, checked before they train anything."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from anybatch.errors import DataError

__all__ = ["Examples", "check_classes", "load_npz"]


class Examples(NamedTuple):
    """N examples: a batch of all of them."""

    inputs: Tensor  # [N, ...]
    targets: Tensor  # [N] of int64 classes, or [N, ...] of numbers

    @classmethod
    def of(cls, inputs: ArrayLike, targets: ArrayLike) -> "Examples":
        """Tensors from arrays: float32 inputs, int64 classes.

        Raises:
            DataError: no examples, lengths that differ, NaN or infinite values, or types that
                are no numbers.
        """
        x, y = _numbers("inputs", np.asarray(inputs)), _numbers("targets", np.asarray(targets))
        if len(x) != len(y):
            raise DataError(f"{len(x)} inputs and {len(y)} targets, expected one target an input.")
        if not len(x):
            raise DataError("the data set is empty, expected at least one example.")
        return cls(x, y)


def load_npz(path: str, inputs: str = "inputs", targets: str = "targets") -> Examples:
    """Arrays of a NumPy .npz file.

    Args:
        path: the file.
        inputs, targets: names of the arrays in it.

    Raises:
        DataError: a file that is missing, damaged, pickled, or lacks an array.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path} does not exist, expected a .npz file of NumPy arrays.")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in (inputs, targets) if name not in arrays]
            if missing:
                raise DataError(
                    f"{path} has no array {missing[0]!r}, it has {sorted(arrays)}. "
                    f"Name them in the recipe: data.args.inputs and data.args.targets."
                )
            return Examples.of(arrays[inputs], arrays[targets])
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no readable .npz file of plain arrays: {error}. "
            f"Write it with numpy.savez; arrays of objects are never unpickled."
        ) from error


def check_classes(targets: Tensor, num_classes: int) -> Tensor:
    """Targets as int64 classes [N].

    Raises:
        DataError: floats, another shape than [N], or a class outside 0 .. num_classes - 1.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        raise DataError(
            f"expected integer class labels of shape ({len(targets)},), got {targets.dtype} of "
            f"shape {tuple(targets.shape)}. One-hot rows become labels by argmax(1)."
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


def _numbers(name: str, array: np.ndarray) -> Tensor:
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name} are {array.dtype} of shape {array.shape}, expected numbers with the examples "
            f"first. Map text labels to integers: numpy.unique(labels, return_inverse=True)."
        )
    if array.dtype.kind in "biu":
        if name == "targets":
            return torch.from_numpy(array.astype(np.int64))
        return torch.from_numpy(array.astype(np.float32))
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise DataError(
            f"{name} hold {array[tuple(bad[0])]} in example {bad[0][0]}, expected finite numbers. "
            f"{len({int(row[0]) for row in bad})} examples are affected: mend or drop them."
        )
    return torch.from_numpy(array.astype(np.float32))
