"""One number per example, such as its length or weight: checked, copied, and told by a digest."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anybatch.errors import OrderError

__all__ = ["digest", "numbers"]


def numbers(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """A copy [N] that nobody can change.

    Raises:
        OrderError: not [N] with N >= 1, not real numbers, or not all finite and at least 0.
    """
    array = _array(name, given)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "biuf":
        raise OrderError(
            f"{name} have shape {array.shape} and dtype {array.dtype}, expected a number for "
            f"each example, [N] with N at least 1: a list, an array or a tensor."
        )
    values = np.array(array, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise OrderError(
            f"{name}[{wrong[0]}] is {values[wrong[0]]}, expected all {name} to be finite and at "
            f"least 0; {wrong.size} of {values.size} are not. Look at these examples, or leave "
            f"them out of the data."
        )
    values.setflags(write=False)
    return values


def digest(values: NDArray[np.float64]) -> str:
    """16 hexadecimal digits of the SHA-256 of the values: for a repr of any N."""
    return hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()[:16]


def _array(name: str, given: ArrayLike) -> NDArray[Any]:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.double() if given.is_floating_point() else given).numpy()  # bfloat16 too
    try:
        return np.asarray(given)
    except ValueError as error:
        raise OrderError(
            f"{name} are ragged, expected a number for each example: {error}. Pass "
            f"[len(example) for example in data], not the examples."
        ) from None
