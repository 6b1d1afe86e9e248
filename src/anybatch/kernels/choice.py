"""Choice among several kernels for the same result: the fastest one here, measured once per shape.

    choice(name, sizes) = argmin over ways of min over rounds of seconds(way)

The first way is torch's own. The others are used only after `use("fastest")`, or with the
environment variable ANYBATCH_KERNELS=fastest. They differ from it by rounding alone, and must be a
tenth faster. Sizes are rounded up to powers of two, so that batches of many sizes need few
measurements. Choices are stored for the next process, see `stored`.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch._torch import are_transforms_active, linear_pointwise
from anybatch.errors import LedgerError
from anybatch.kernels.stored import read_choices, write_choices

__all__ = [
    "SMALL",
    "allocate",
    "choices",
    "find_way",
    "get_way",
    "has_alternative",
    "is_plain",
    "multiply",
    "name_product",
    "run_fastest",
    "use",
    "use_torch_kernels",
]

T = TypeVar("T")

SMALL = 2**20
"""Multiplications below which only torch's own kernel is used."""

_GAIN = 0.9  # another way must take less than this share of torch's time
_ROUNDS, _SECONDS = 5, 0.1  # limits of one measurement
_WAYS = ("torch", "fastest", "onednn")

_LARGE_PAGES = {torch.float32: np.float32, torch.float64: np.float64}


@dataclass(slots=True)
class _Choices:
    """Choices of this process."""

    way: str | None = None  # set by `use`; None: read from the environment when needed
    by_key: dict[str, str] = field(default_factory=dict)  # content of the file, by rounded sizes
    by_sizes: dict[tuple[object, ...], str] = field(default_factory=dict)  # by exact sizes

    def clear(self) -> None:
        """Forget what was measured and read."""
        self.by_key.clear()
        self.by_sizes.clear()


choices = _Choices()
"""Choices of this process. `choices.way` is None until `get_way` has read the environment."""


def use(way: str) -> None:
    """Select the kernels that compute products, max pooling and per-example norms.

    Results of two ways differ by rounding alone.

    Args:
        way: "torch", torch's own kernels, which is the default; "fastest", the kernel that is
            measured to be the fastest for each shape on this machine; "onednn", oneDNN wherever it
            has a kernel.

    Raises:
        LedgerError: another name.

    Example:
        >>> import anybatch.kernels
        >>> anybatch.kernels.use("fastest")
        >>> anybatch.kernels.use("torch")  # back to the default
    """
    choices.way = _check_way(way, "kernels.use")


def get_way() -> str:
    """Return the way that `use` or `ANYBATCH_KERNELS` selects."""
    if choices.way is None:
        way = os.environ.get("ANYBATCH_KERNELS", "torch")
        choices.way = _check_way(way, "ANYBATCH_KERNELS")
    return choices.way


@contextmanager
def use_torch_kernels() -> Iterator[None]:
    """Compute with torch's own kernels within the context."""
    before = choices.way
    use("torch")
    try:
        yield
    finally:
        choices.way = before


def run_fastest(
    name: str, like: Tensor, sizes: Sequence[int], ways: Mapping[str, Callable[[], T]]
) -> T:
    """Compute a result in the way that is the fastest for its sizes.

    Args:
        name: of the computation.
        like: a tensor with its type and device.
        sizes: of its dimensions; their product is the number of multiplications.
        ways: functions by name, the default first; they agree up to rounding.
    """
    default = next(iter(ways))
    if len(ways) == 1 or prod(sizes) < SMALL or like.device.type != "cpu":
        return ways[default]()
    way = find_way(name, like, sizes)
    if way not in ways and get_way() != "fastest":
        way = default
    if way is None or way not in ways:
        way = _choose(_make_key(name, like, sizes), ways)
        choices.by_sizes[name, like.dtype, *sizes, torch.get_num_threads()] = way
    return ways[way]()


def find_way(name: str, like: Tensor, sizes: Sequence[int]) -> str | None:
    """Return the selected way, or the one measured here or in another process; None: neither."""
    if (way := get_way()) != "fastest":
        return way
    place = (name, like.dtype, *sizes, torch.get_num_threads())
    if place not in choices.by_sizes:
        if not choices.by_key:
            choices.by_key.update(_read())
        stored = choices.by_key.get(_make_key(name, like, sizes))
        if stored is None:
            return None
        choices.by_sizes[place] = stored
    return choices.by_sizes[place]


def multiply(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x w^T + bias without a graph, for x [n, d], w [p, d] and bias [p] or views.

    oneDNN's kernel has no derivative. It is available for float32 on the CPU.
    """
    if not has_alternative(x, w):
        return F.linear(x, w, bias)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: F.linear(x, w, bias),
        "onednn": lambda: linear_pointwise(x, w, bias, "none", [], ""),
    }
    strides = "".join("n" if t.stride(1) == 1 else "t" for t in (x, w))
    return run_fastest(name_product(strides, bias), x, (*x.shape, len(w)), ways)


def name_product(strides: str, bias: Tensor | None = None) -> str:
    """Return the name of a product; "n" is for contiguous rows, "t" for columns, of x and w."""
    return f"product {strides}" if bias is None else f"product {strides} and bias"


def allocate(shape: Sequence[int], like: Tensor) -> Tensor:
    """Allocate memory without setting it.

    NumPy asks the system for large pages, which takes a quarter of torch's time for a gigabyte.
    """
    numpy_dtype = _LARGE_PAGES.get(like.dtype)
    if like.device.type != "cpu" or numpy_dtype is None or prod(shape) < SMALL:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, numpy_dtype))


def has_alternative(x: Tensor, w: Tensor) -> bool:
    """Return whether x w^T has another kernel than torch's, and is large enough to choose."""
    return (
        get_way() != "torch"
        and x.numel() * len(w) >= SMALL
        and x.dtype == w.dtype == torch.float32
        and is_plain(x)
        and is_plain(w)
        and linear_pointwise is not None
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def is_plain(x: Tensor) -> bool:
    """Return whether a tensor is in CPU memory and torch neither compiles nor transforms it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not are_transforms_active()
    )


def _make_key(name: str, like: Tensor, sizes: Sequence[int]) -> str:
    rounded = "x".join(str(1 << (size - 1).bit_length()) for size in sizes)
    return f"{name}, {like.dtype}, {rounded}, {torch.get_num_threads()} threads"


def _choose(key: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    by_key = choices.by_key
    if not by_key:
        by_key.update(_read())
    if by_key.get(key) not in ways:
        by_key[key] = _measure(ways)
        write_choices("kernels", by_key)
    return by_key[key]


def _measure(ways: Mapping[str, Callable[[], Any]]) -> str:
    """Return the fastest way. The ways take turns, so that other load hits all of them."""
    best = {name: float("inf") for name in ways}
    for way in ways.values():
        way()  # warm up
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - begin > _SECONDS:
            break
    default, winner = next(iter(ways)), min(best, key=best.__getitem__)
    return winner if best[winner] < _GAIN * best[default] else default


def _check_way(way: str, place: str) -> str:
    if way not in _WAYS:
        raise LedgerError(f"{place} is {way!r}. It must be one of {', '.join(_WAYS)}.")
    return way


def _read() -> dict[str, str]:
    return {key: way for key, way in read_choices("kernels").items() if isinstance(way, str)}
