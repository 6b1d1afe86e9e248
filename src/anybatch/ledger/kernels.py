"""Several ways to compute the same: the fastest here, measured once per shape and kept.

    choice(what, sizes) = argmin over ways of min over rounds of seconds(way)

The first way is the default, from which another differs by rounding alone; it must be a twentieth
faster to be chosen. Sizes are rounded up to powers of two, so that ragged batches need few
measurements, and the results of two shapes that share a choice come from the same way. Choices
last as long as the process, and beyond in

    $XDG_CACHE_HOME/anybatch/kernels-VERSION-CPU.json

A file that cannot be read or written is done without. `ANYBATCH_KERNELS=torch`, or `pin("torch")`,
takes the default everywhere: the same bits whatever was measured.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from anybatch.errors import LedgerError

__all__ = ["fastest", "pin", "product"]

T = TypeVar("T")

_GAIN = 0.95  # of the default's time, that another way must stay under
_ROUNDS, _SECONDS = 5, 0.1  # of one measurement, at most
SMALL = 2**20  # multiplications, below which there is no choice

_PINS = ("torch", "onednn")
_chosen: dict[str, str] = {}
_pinned: list[str] = []


def pin(way: str | None) -> None:
    """Take one way wherever it is among those that there are, the default elsewhere.

    Args:
        way: "torch", the default everywhere; "onednn"; None: what `ANYBATCH_KERNELS` says, or else
            what is measured.

    Raises:
        LedgerError: another name.
    """
    _pinned[:] = [] if way is None else [_known(way, "kernels.pin")]


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
    pinned = _pinned[0] if _pinned else _environment()
    if pinned is not None:
        return ways.get(pinned, ways[default])()
    if len(ways) == 1 or prod(sizes) < SMALL or like.device.type != "cpu":
        return ways[default]()
    rounded = "x".join(str(1 << (size - 1).bit_length() if size else 0) for size in sizes)
    key = f"{what}, {like.dtype} {rounded}, {torch.get_num_threads()} threads"
    if not _chosen:
        _chosen.update(_read())
    if _chosen.get(key) not in ways:
        _chosen[key] = _measured(ways)
        _write()
    return ways[_chosen[key]]()


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias of x [n, d], w [p, d] and bias [p], any of them a view; without a graph.

    oneDNN's kernel has no derivative, and is offered for float32 on the CPU alone.
    """
    (n, d), p = x.shape, len(w)
    if not pays(x, w):
        return torch.nn.functional.linear(x, w, bias)
    ways = {
        "torch": lambda: torch.nn.functional.linear(x, w, bias),
        "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], ""),
    }
    layout = "".join("n" if t.stride(-1) == 1 else "t" for t in (x, w))
    return fastest(f"product {layout}{'' if bias is None else ' bias'}", x, (n, d, p), ways)


def pays(x: Tensor, w: Tensor) -> bool:
    """Whether there is a choice for x w^T, and enough to do for it to matter."""
    return (
        x.numel() * len(w) >= SMALL
        and all(
            t.device.type == "cpu"
            and t.dtype == torch.float32
            and type(t) in (Tensor, torch.nn.Parameter)
            for t in (x, w)
        )
        and torch.backends.mkldnn.is_available()
    )


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


def _known(way: str, where: str) -> str:
    if way not in _PINS:
        raise LedgerError(
            f"{where} is {way!r}, expected one of {', '.join(_PINS)}. Leave it out for what is "
            f"fastest on this machine."
        )
    return way


def _environment() -> str | None:
    way = os.environ.get("ANYBATCH_KERNELS")
    return _known(way, "ANYBATCH_KERNELS") if way else None


def _file() -> Path:
    """Where choices of this machine and torch are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cpu = sha256(_processor().encode()).hexdigest()[:12]
    return Path(home) / "anybatch" / f"kernels-{torch.__version__}-{cpu}.json"


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
    except (OSError, RuntimeError, ValueError, AttributeError):
        return {}


def _write() -> None:
    """All that is known, put in place at once: another process reads the old file or the new."""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_chosen, indent=1, sort_keys=True) + "\n")
        partial.replace(file)
    except (OSError, RuntimeError):  # of a user without a home
        pass
