"""Checks of the arguments of orders."""

import hashlib
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anybatch.errors import OrderError

__all__ = [
    "MAX_EXAMPLES",
    "check_batch_size",
    "check_integer",
    "check_integers",
    "check_step",
    "compute_digest",
    "copy_numbers",
]

MAX_EXAMPLES: Final = 10**12

_COUNT = (
    "Pass len(data), or len(loader.dataset). If the data set is empty, check its path and filters."
)

_INTEGERS = (
    ("num_examples", 1, _COUNT),
    ("batch_size", 1, "It counts the examples of one update, over all ranks. Divide with //."),
    ("seed", 0, "Any integer from 0 to 2^64 - 1 chooses an order."),
    ("window", 1, "It counts the batches whose examples are sorted together."),
)


def check_integer(name: str, value: object, least: int, hint: str) -> int:
    """Return a value as a Python integer.

    Raises:
        OrderError: it is no integer, or below the least.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise OrderError(
            f"{name} is {value!r} of type {type(value).__name__}. It must be an integer. {hint}"
        )
    if value < least:
        raise OrderError(f"{name} is {value}. It must be at least {least}. {hint}")
    return int(value)


def check_step(step: object) -> int:
    """Return a step as a Python integer; fail as `check_integer`."""
    return check_integer("step", step, 0, "Steps count from 0.")


def check_integers(order: object) -> None:
    """Check the integer fields of an order, and replace each by a Python integer.

    Raises:
        OrderError: a field is no integer, or out of range.
    """
    for name, least, hint in _INTEGERS:
        if hasattr(order, name):
            value = check_integer(name, getattr(order, name), least, hint)
            object.__setattr__(order, name, value)
    num_examples, seed = getattr(order, "num_examples", 1), getattr(order, "seed", 0)
    if num_examples > MAX_EXAMPLES:
        raise OrderError(
            f"num_examples is {num_examples}. It must be at most 10^12: the permutation is tested "
            f"up to there. Count documents or windows of text, not tokens or bytes."
        )
    if seed >= 2**64:
        raise OrderError(
            f"seed is {seed}. It must be less than 2^64: a key has 64 bits, so a larger seed gives "
            f"the order of a smaller one. Pass {seed % 2**64}."
        )


def check_batch_size(batch_size: int, num_examples: int, fix: str = "Use") -> None:
    """Refuse a batch larger than an epoch."""
    if batch_size > num_examples:
        raise OrderError(
            f"batch_size is {batch_size}. It must be at most num_examples, {num_examples}: an "
            f"epoch does not fill one batch. {fix} a batch of at most {num_examples}."
        )


def copy_numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Copy one number per example, such as its length or weight, into a read-only array [N].

    Raises:
        OrderError: not [N] with N >= 1, not real numbers, or not all finite and at least 0.
    """
    array = _convert(name, values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "biuf":
        raise OrderError(
            f"{name} have shape {array.shape} and dtype {array.dtype}. Pass one number per "
            f"example, [N] with N at least 1: a list, an array or a tensor."
        )
    numbers = np.array(array, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if wrong.size:
        raise OrderError(
            f"{name}[{wrong[0]}] is {numbers[wrong[0]]}. All {name} must be finite and at least 0; "
            f"{wrong.size} of {numbers.size} are not. Look at these examples, or leave them out of "
            f"the data."
        )
    numbers.setflags(write=False)
    return numbers


def _convert(name: str, values: ArrayLike) -> NDArray[Any]:
    """Convert a list, an array or a tensor to an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16, so floats go through float64.
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise OrderError(
            f"{name} are ragged: {error}. Pass one number per example, such as "
            f"[len(example) for example in data], not the examples."
        ) from None


def compute_digest(values: NDArray[np.float64]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the values: a short repr of any N."""
    return hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()[:16]
