"""Choice among several ways to compute the same: the fastest here, measured once per shape.

    choice(what, sizes) = argmin over ways of min over rounds of seconds(way)

The first way is torch's own, and the only one unless `use("fastest")` or `ANYBATCH_KERNELS=fastest`
asks for the choice. Another way differs from it by rounding alone, and must be a tenth faster to be
chosen. Sizes are rounded up to powers of two, so that ragged batches need few
measurements, and the results of two shapes that share a choice come from the same way. Choices
last as long as the process, and beyond in

    $XDG_CACHE_HOME/anybatch/kernels-VERSION-CPU.json

If the file cannot be read or written, the choice is made anew in each process.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.errors import LedgerError
from anybatch.paths import user_folder

__all__ = [
    "SMALL",
    "chosen",
    "default_alone",
    "empty",
    "fastest",
    "has_choice",
    "is_plain",
    "pays",
    "product",
    "product_of",
    "use",
    "way_in_use",
]

T = TypeVar("T")

SMALL = 2**20
"""Multiplications below which there is no choice."""

_GAIN = 0.9  # of the default's time, that another way must stay under
_ROUNDS, _SECONDS = 5, 0.1  # of one measurement, at most
_WAYS = ("torch", "fastest", "onednn")

_LARGE_PAGES = {torch.float32: np.float32, torch.float64: np.float64}

_kept: dict[str, str] = {}  # what is in the file: ways by what and rounded sizes
_chosen: dict[tuple[object, ...], str] = {}  # the same by what and sizes themselves
_in_use: list[str] = []  # one way; empty until it is asked for


def use(way: str) -> None:
    """Say by which kernels products, max pooling and per-example norms are computed.

    Results of two ways differ by rounding alone.

    Args:
        way: "torch", torch's own, which is the default; "fastest", what is measured to be the
            fastest for each shape on this machine; "onednn", oneDNN wherever it has a kernel.

    Raises:
        LedgerError: another name.

    Example:
        >>> import anybatch.kernels
        >>> anybatch.kernels.use("fastest")
        >>> anybatch.kernels.use("torch")  # back to the default
    """
    _in_use[:] = [_check_way(way, "kernels.use")]


def way_in_use() -> str:
    """Return the way that `use` or `ANYBATCH_KERNELS` asked for."""
    if not _in_use:
        _in_use.append(_check_way(os.environ.get("ANYBATCH_KERNELS", "torch"), "ANYBATCH_KERNELS"))
    return _in_use[0]


@contextmanager
def default_alone() -> Iterator[None]:
    """Compute by torch's own kernels for a while."""
    before = list(_in_use)
    use("torch")
    try:
        yield
    finally:
        _in_use[:] = before


def fastest(
    what: str, like: Tensor, sizes: Sequence[int], ways: Mapping[str, Callable[[], T]]
) -> T:
    """The result of the way that is fastest for such sizes.

    Args:
        what: is computed.
        like: a tensor it is computed from.
        sizes: of its dimensions; their product is the number of multiplications.
        ways: by name, the default first; each computes the same, up to rounding.
    """
    default = next(iter(ways))
    if len(ways) == 1 or prod(sizes) < SMALL or like.device.type != "cpu":
        return ways[default]()
    way = chosen(what, like, sizes)
    if way not in ways and way_in_use() != "fastest":
        way = default
    if way is None or way not in ways:
        way = _choice(_key(what, like, sizes), ways)
        _chosen[what, like.dtype, *sizes, torch.get_num_threads()] = way
    return ways[way]()


def chosen(what: str, like: Tensor, sizes: Sequence[int]) -> str | None:
    """Return the way in use, or the one measured here or in another process; None: neither."""
    if (way := way_in_use()) != "fastest":
        return way
    place = (what, like.dtype, *sizes, torch.get_num_threads())
    if place not in _chosen:
        if not _kept:
            _kept.update(_read())
        if (kept := _kept.get(_key(what, like, sizes))) is None:
            return None
        _chosen[place] = kept
    return _chosen[place]


def has_choice() -> bool:
    """Whether ways other than torch's may be taken at all."""
    return way_in_use() != "torch"


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias of x [n, d], w [p, d] and bias [p], any of them a view; without a graph.

    oneDNN's kernel has no derivative, and is offered for float32 on the CPU alone.
    """
    if not pays(x, w):
        return F.linear(x, w, bias)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: F.linear(x, w, bias),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], ""),
    }
    strides = "".join("n" if t.stride(1) == 1 else "t" for t in (x, w))
    return fastest(product_of(strides, bias), x, (*x.shape, len(w)), ways)


def product_of(strides: str, bias: Tensor | None = None) -> str:
    """What `fastest` knows a product by: "n" for rows in a piece, "t" for columns, of x and w."""
    return f"product {strides}" if bias is None else f"product {strides} and bias"


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for what is written once, unset; NumPy asks the system for large pages, so that a
    gigabyte on the CPU is there in a quarter of the time that torch's takes."""
    numpy_dtype = _LARGE_PAGES.get(like.dtype)
    if like.device.type != "cpu" or numpy_dtype is None or prod(shape) < SMALL:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, numpy_dtype))


def pays(x: Tensor, w: Tensor) -> bool:
    """Whether there is a choice for x w^T, and enough to do for it to matter."""
    return (
        has_choice()
        and x.numel() * len(w) >= SMALL
        and x.dtype == w.dtype == torch.float32
        and is_plain(x)
        and is_plain(w)
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def is_plain(x: Tensor) -> bool:
    """Whether it is in this CPU's memory, and no transform of torch looks on."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _key(what: str, like: Tensor, sizes: Sequence[int]) -> str:
    rounded = "x".join(str(1 << (size - 1).bit_length()) for size in sizes)
    return f"{what}, {like.dtype}, {rounded}, {torch.get_num_threads()} threads"


def _choice(key: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    if not _kept:
        _kept.update(_read())
    if _kept.get(key) not in ways:
        _kept[key] = _measured(ways)
        _write()
    return _kept[key]


def _measured(ways: Mapping[str, Callable[[], Any]]) -> str:
    """In turn, so that what else the machine does falls on all alike; once before, to warm up."""
    best = {name: float("inf") for name in ways}
    for way in ways.values():
        way()
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() - begun > _SECONDS:
            break
    default, winner = next(iter(ways)), min(best, key=best.__getitem__)
    return winner if best[winner] < _GAIN * best[default] else default


def _check_way(way: str, place: str) -> str:
    if way not in _WAYS:
        raise LedgerError(f"{place} is {way!r}. It must be one of {', '.join(_WAYS)}.")
    return way


def _file() -> Path:
    """Where choices of this machine and torch are kept.

    Raises:
        FileNotFoundError: for a user without a home.
    """
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise FileNotFoundError("the user has no home")
    cpu = sha256(_processor().encode()).hexdigest()[:12]
    return folder / f"kernels-{torch.__version__}-{cpu}.json"


def _processor() -> str:
    """What tells one processor from another."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    first = cpuinfo.read_text().split("\n\n")[0].splitlines()
    changing = ("processor", "cpu MHz", "bogomips", "apicid", "initial apicid", "core id")
    return "\n".join(row for row in first if not row.startswith(changing))


def _read() -> dict[str, str]:
    try:
        found = json.loads(_file().read_text())
        return {key: way for key, way in found.items() if isinstance(way, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _write() -> None:
    """All that is known, put in place at once: another process reads the old file or the new."""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_kept, indent=1, sort_keys=True) + "\n")
        partial.replace(file)
    except OSError:
        pass
