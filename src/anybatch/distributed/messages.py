"""What ranks tell each other: small things, errors, and sums of tensors.

`group=None` means this process alone, and every function is then the identity. Errors are
agreed upon before a collective, so that no rank waits for one that has given up.
"""

import io
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, cast, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from anybatch.distributed.connection import (
    LostRankError,
    RankError,
    connected,
    device_of,
    num_ranks,
    rank_of,
)
from anybatch.errors import AnybatchError

__all__ = [
    "Coming",
    "Origin",
    "agreed",
    "all_sum",
    "by_itself",
    "end_to_end",
    "everywhere",
    "largest",
    "of_first",
    "origin_of",
    "slices",
    "to_all",
]

T = TypeVar("T")
Splits = tuple[list[int] | None, list[int] | None]  # of rows that come and that are sent, by rank

_AT_ONCE = 4096  # bytes of a message that needs no second one
_RAISED, _RAISED_BY_ALL = "raised on rank ", "raised on every rank"
_LEFT = (
    "a rank has left its loop and others have not, expected all to leave after the same update: "
    "by an error in the loop's body, which its own output tells, or by a break. Break on what is "
    "equal on all ranks, such as step.loss."
)


class Origin(NamedTuple):
    """Where an error began."""

    rank: int  # the first
    is_shared: bool  # whether all have made the same


def everywhere(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `work()` returns on every rank, in order; fails on all of them if it fails on one.

    Args:
        work: returns something small that pickles, with tensors on the CPU.

    Raises:
        Exception: that of the first rank that failed, on every rank, with a note naming it: all
            must go the same way, also where they failed in different ways. Where all have failed
            alike, each raises its own.
        RankError: a rank that is gone.
    """
    if group is None:
        return [work()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except LostRankError:
        raise
    except Exception as caught:
        error = caught
    told = _exchanged((_portable(error), result), group)
    raised = {rank: other for rank, (other, _) in enumerate(told) if other is not None}
    if (
        error is not None
        and 1 < len(told) == len(raised)
        and len(set(map(repr, raised.values()))) == 1
    ):
        error.add_note(_RAISED_BY_ALL)
        raise error
    for rank, other in raised.items():
        first = error if error is not None and rank == rank_of(group) else other
        first.add_note(f"{_RAISED}{rank}")
        raise first
    return [result for _, result in told]


def of_first(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `work()` returns on the first rank, told to all; errors as `everywhere`."""
    return cast(T, everywhere(lambda: work() if rank_of(group) == 0 else None, group)[0])


def agreed(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `work()` returns on this rank, once it has succeeded on all; errors as `everywhere`.

    What it returns stays here, so that it may be anything; one number travels.
    """
    results: list[T] = []
    with by_itself(group):
        results.append(work())
    return results[0]


@contextmanager
def by_itself(group: ProcessGroup | None) -> Iterator[None]:
    """What each rank does for itself, until all have done it; errors as `everywhere`.

    A generator may yield in it: if it is closed there, the others are told that it was.
    """
    error: Exception | None = None
    try:
        yield
    except GeneratorExit:
        with suppress(Exception):  # they may be gone already
            _agree(RankError(_LEFT), group)
        raise
    except LostRankError:
        raise
    except Exception as caught:
        if group is None:
            raise
        error = caught
    _agree(error, group)


def largest(number: int, group: ProcessGroup | None) -> int:
    """The largest of the ranks' numbers."""
    if group is None:
        return number
    found = torch.tensor([number], device=device_of(group))
    with connected(group):
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return int(found)


def all_sum(tensors: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Add up each tensor over the ranks, in place, in one message a dtype."""
    if group is None:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        with connected(group):
            dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [t.numel() for t in same])
        for tensor, piece in zip(same, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


@final
class Coming:
    """What is on its way from all ranks, while this one goes on."""

    def __init__(self, come: Tensor, sent: Tensor, splits: Splits, group: ProcessGroup) -> None:
        """Begin to send rows, and to receive others."""
        self._come, self._sent, self._group = come, sent, group
        with connected(group):
            work = dist.all_to_all_single(come, sent, *splits, group, async_op=True)
        self._work = cast(dist.Work, work)

    @property
    def is_here(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self._work.is_completed()

    def wait(self) -> Tensor:
        """What has come, once all of it has."""
        with connected(self._group):
            self._work.wait()
        return self._come


def slices(pieces: Tensor, counts: Sequence[int], group: ProcessGroup) -> Coming:
    """Send to each rank its slice of every piece.

    Args:
        pieces: [k, n] of this rank; every rank has its own k, and all the same n.
        counts: k of each rank, in order.

    Returns:
        This rank's slice of the pieces of all ranks, in order: [sum k, m], m = n / ranks rounded
        up; the last slices are padded.
    """
    ranks, (own, size) = num_ranks(group), pieces.shape
    width = -(-size // ranks)  # of a slice; the last is padded
    if size < ranks * width:
        pieces = F.pad(pieces, (0, ranks * width - size))
    sent = pieces.view(own, ranks, width).transpose(0, 1).reshape(ranks * own, width)
    come = pieces.new_empty(sum(counts), width)
    return Coming(come, sent, (list(counts), [own] * ranks), group)


def to_all(own: Tensor, group: ProcessGroup) -> Coming:
    """Send a vector [n] of each rank, all of the same n, to all: [ranks * n] in their order.

    Gloo's all_gather goes round a ring, one wait after the other; its all_to_all sends all at once,
    as many bytes, in a third of the time where they are few.
    """
    ranks = num_ranks(group)
    return Coming(own.new_empty(ranks * len(own)), own.repeat(ranks), (None, None), group)


def end_to_end(own: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """The vectors of all ranks one after the other, of these sizes, on every rank."""
    width = max(sizes)
    padded = own if len(own) == width else F.pad(own, (0, width - len(own)))
    told = to_all(padded, group).wait()
    if min(sizes) == width:
        return told
    rows = told.view(len(sizes), width)
    return torch.cat([one[:size] for one, size in zip(rows, sizes, strict=True)])


def origin_of(error: BaseException) -> Origin | None:
    """Where an error of `everywhere` or `agreed` began; None for any other error."""
    for note in getattr(error, "__notes__", ()):
        if note == _RAISED_BY_ALL:
            return Origin(0, is_shared=True)
        if match := re.fullmatch(rf"{_RAISED}(\d+)", note):
            return Origin(int(match[1]), is_shared=False)
    return None


def _exchanged(thing: Any, group: ProcessGroup) -> list[Any]:
    """The things of all ranks: in one message, or two where one of them is long."""
    content = torch.frombuffer(bytearray(_pickled(thing)), dtype=torch.uint8)
    length = torch.tensor([len(content)]).view(torch.uint8)  # 8 bytes
    told = _gathered(torch.cat([length, content[:_AT_ONCE]]), 8 + _AT_ONCE, group)
    lengths = [int(one[:8].view(torch.int64)) for one in told]
    rest = [torch.empty(0, dtype=torch.uint8)] * len(told)
    if max(lengths) > _AT_ONCE:
        rest = _gathered(content[_AT_ONCE:], max(lengths) - _AT_ONCE, group)
    whole = [torch.cat([one[8:], more]) for one, more in zip(told, rest, strict=True)]
    return [
        pickle.loads(one[:length].numpy().tobytes())
        for one, length in zip(whole, lengths, strict=True)
    ]


def _gathered(content: Tensor, size: int, group: ProcessGroup) -> list[Tensor]:
    """The bytes of all ranks, each padded to so many."""
    padded = torch.zeros(size, dtype=torch.uint8)
    padded[: len(content)] = content
    told = to_all(padded.to(device_of(group)), group).wait()
    return list(told.cpu().view(-1, size))


class _Pickler(pickle.Pickler):
    """With plain tensors as bytes: a tenth of the time that torch takes for small ones."""

    def reducer_override(self, thing: Any) -> Any:
        is_plain = type(thing) is Tensor and thing.device.type == "cpu"
        if not is_plain or thing.requires_grad or thing.layout != torch.strided:
            return NotImplemented
        raw = thing.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        return _tensor, (raw.numpy().tobytes(), thing.dtype, tuple(thing.shape))


def _pickled(thing: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(thing)
    return stream.getvalue()


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _portable(error: Exception | None) -> Exception | None:
    """The error itself where it survives pickling, its words otherwise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AnybatchError(f"{type(error).__name__}: {error}")
    return error


def _agree(error: Exception | None, group: ProcessGroup | None) -> None:
    """Go on if no rank has an error; one number travels where none has."""

    def tell() -> None:
        if error is not None:
            raise error

    if largest(int(error is not None), group):
        everywhere(tell, group)
