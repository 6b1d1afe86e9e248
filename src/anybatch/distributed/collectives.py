"""Collectives: exchange small objects, errors and sums of tensors between ranks.

`group=None` means this process alone; every function then does its work locally. Before a tensor
collective the ranks agree that none has failed, so that no rank waits for one that has given up.
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

from anybatch.distributed.group import (
    LostRankError,
    RankError,
    get_device,
    get_num_ranks,
    get_rank,
    translate_connection_errors,
)
from anybatch.errors import AnybatchError

__all__ = [
    "ErrorOrigin",
    "Transfer",
    "all_gather_object",
    "all_gather_vectors",
    "all_reduce_max",
    "all_reduce_sum",
    "broadcast_from_first",
    "call_together",
    "find_origin",
    "pickle_object",
    "raise_together",
    "start_all_gather",
    "start_all_to_all",
]

T = TypeVar("T")
Splits = tuple[list[int] | None, list[int] | None]  # rows to receive and to send, by rank

_SHORT_BYTES = 4096  # longer objects take a second message
_RAISED, _RAISED_BY_ALL = "raised on rank ", "raised on every rank"
_LOOP_EXIT = (
    "a rank has left its loop and others have not. All ranks must leave the loop after the same "
    "update. Either the loop's body raised an error on that rank, which its own output shows, or "
    "it stopped at a break. Break on a value that is equal on all ranks, such as step.loss."
)


class ErrorOrigin(NamedTuple):
    """Rank on which an error was raised."""

    rank: int  # the first, if several raised
    is_shared: bool  # whether all ranks raised the same error


def all_gather_object(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """Run `work` on every rank and gather the results of all ranks; raise together.

    Args:
        work: returns a small object that pickles, with tensors on the CPU.

    Raises:
        Exception: on every rank if `work` raises on any: the error of the first rank that raised,
            with a note that names the rank. If all ranks raise the same error, each raises its own.
        RankError: a rank is lost.
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
    outcomes = _all_gather_pickled((_make_picklable(error), result), group)
    errors = {rank: other for rank, (other, _) in enumerate(outcomes) if other is not None}
    if (
        error is not None
        and 1 < len(outcomes) == len(errors)
        and len(set(map(repr, errors.values()))) == 1
    ):
        error.add_note(_RAISED_BY_ALL)
        raise error
    for rank, other in errors.items():
        first = error if error is not None and rank == get_rank(group) else other
        first.add_note(f"{_RAISED}{rank}")
        raise first
    return [result for _, result in outcomes]


def broadcast_from_first(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Run `work` on the first rank and broadcast its result; errors as in `all_gather_object`."""
    results = all_gather_object(lambda: work() if get_rank(group) == 0 else None, group)
    return cast(T, results[0])


def call_together(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Run `work` on every rank, and return this rank's result once all have succeeded.

    The result may be any object: it is not sent. Errors are as in `all_gather_object`.
    """
    if group is None:
        return work()
    results: list[T] = []
    with raise_together(group):
        results.append(work())
    return results[0]


@contextmanager
def raise_together(group: ProcessGroup | None) -> Iterator[None]:
    """Run local work, then raise on every rank if any rank failed; errors as `all_gather_object`.

    A generator may yield inside. If it is closed there, the other ranks raise a `RankError`.
    """
    error: Exception | None = None
    try:
        yield
    except GeneratorExit:
        with suppress(Exception):  # the other ranks may be gone already
            _raise_if_any(RankError(_LOOP_EXIT), group)
        raise
    except LostRankError:
        raise
    except Exception as caught:
        if group is None:
            raise
        error = caught
    _raise_if_any(error, group)


def all_reduce_max(number: int, group: ProcessGroup | None) -> int:
    """Return the largest of the ranks' numbers."""
    if group is None:
        return number
    largest = torch.tensor([number], device=get_device(group))
    with translate_connection_errors(group):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return int(largest)


def all_reduce_sum(tensors: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Sum each tensor over the ranks, in place, with one message for each dtype."""
    if group is None:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        with translate_connection_errors(group):
            dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [t.numel() for t in same])
        for tensor, piece in zip(same, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


@final
class Transfer:
    """An all-to-all exchange of rows that is in flight while this rank continues."""

    def __init__(self, output: Tensor, rows: Tensor, splits: Splits, group: ProcessGroup) -> None:
        """Start to send rows, and to receive those of the other ranks into `output`."""
        self._output, self._rows, self._group = output, rows, group  # kept alive until the end
        with translate_connection_errors(group):
            work = dist.all_to_all_single(output, rows, *splits, group, async_op=True)
        self._work = cast(dist.Work, work)

    @property
    def is_complete(self) -> bool:
        """True if `wait` would return at once."""
        return self._work.is_completed()

    def wait(self) -> Tensor:
        """Wait for all rows, and return them."""
        with translate_connection_errors(self._group):
            self._work.wait()
        return self._output


def start_all_to_all(pieces: Tensor, counts: Sequence[int], group: ProcessGroup) -> Transfer:
    """Start to send each rank its slice of every piece.

    Args:
        pieces: [k, n] of this rank; k may differ between ranks, n may not.
        counts: k of each rank.

    Returns:
        A transfer of this rank's slice of the pieces of all ranks, by rank: [sum k, m], where m is
        n / ranks rounded up. The last slices are padded.
    """
    ranks, (count, size) = get_num_ranks(group), pieces.shape
    width = -(-size // ranks)
    if size < ranks * width:
        pieces = F.pad(pieces, (0, ranks * width - size))
    rows = pieces.view(count, ranks, width).transpose(0, 1).reshape(ranks * count, width)
    output = pieces.new_empty(sum(counts), width)
    return Transfer(output, rows, (list(counts), [count] * ranks), group)


def start_all_gather(vector: Tensor, group: ProcessGroup) -> Transfer:
    """Start to send a vector [n], of one n on all ranks, to every rank: [ranks * n], by rank.

    Gloo's all_gather passes the data around a ring, one step after the other. Its all_to_all sends
    to all ranks at once: the same bytes, in a third of the time where they are few.
    """
    ranks = get_num_ranks(group)
    return Transfer(
        vector.new_empty(ranks * len(vector)), vector.repeat(ranks), (None, None), group
    )


def all_gather_vectors(vector: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Gather the vectors of all ranks, of these sizes, and concatenate them by rank."""
    width = max(sizes)
    padded = vector if len(vector) == width else F.pad(vector, (0, width - len(vector)))
    vectors = start_all_gather(padded, group).wait()
    if min(sizes) == width:
        return vectors
    rows = vectors.view(len(sizes), width)
    return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])


def find_origin(error: BaseException) -> ErrorOrigin | None:
    """Find the rank that raised an error of `all_gather_object`; None for any other error."""
    for note in getattr(error, "__notes__", ()):
        if note == _RAISED_BY_ALL:
            return ErrorOrigin(0, is_shared=True)
        if match := re.fullmatch(rf"{_RAISED}(\d+)", note):
            return ErrorOrigin(int(match[1]), is_shared=False)
    return None


def _all_gather_pickled(item: Any, group: ProcessGroup) -> list[Any]:
    """Gather the objects of all ranks: in one message, or two where one of them is long."""
    content = torch.frombuffer(bytearray(pickle_object(item)), dtype=torch.uint8)
    length = torch.tensor([len(content)]).view(torch.uint8)  # 8 bytes
    heads = _all_gather_bytes(torch.cat([length, content[:_SHORT_BYTES]]), 8 + _SHORT_BYTES, group)
    lengths = [int(head[:8].view(torch.int64)) for head in heads]
    tails = [torch.empty(0, dtype=torch.uint8)] * len(heads)
    if max(lengths) > _SHORT_BYTES:
        tails = _all_gather_bytes(content[_SHORT_BYTES:], max(lengths) - _SHORT_BYTES, group)
    contents = [torch.cat([head[8:], tail]) for head, tail in zip(heads, tails, strict=True)]
    return [
        pickle.loads(content[:length].numpy().tobytes())
        for content, length in zip(contents, lengths, strict=True)
    ]


def _all_gather_bytes(content: Tensor, size: int, group: ProcessGroup) -> list[Tensor]:
    """Gather the bytes of all ranks, each padded to one size."""
    padded = torch.zeros(size, dtype=torch.uint8)
    padded[: len(content)] = content
    return list(start_all_gather(padded.to(get_device(group)), group).wait().cpu().view(-1, size))


class _Pickler(pickle.Pickler):
    """Pickler of plain tensors as bytes, in a tenth of torch's time for small ones."""

    def reducer_override(self, item: Any) -> Any:
        is_plain = type(item) is Tensor and item.device.type == "cpu"
        if not is_plain or item.requires_grad or item.layout != torch.strided:
            return NotImplemented
        raw = item.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        content = pickle.PickleBuffer(raw.numpy())  # it is loaded as a bytearray
        return _unpickle_tensor, (content, item.dtype, tuple(item.shape))


def pickle_object(item: Any) -> bytes:
    """Pickle an object, with its plain tensors as bytes."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(item)
    return stream.getvalue()


def _unpickle_tensor(content: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape)


def _make_picklable(error: Exception | None) -> Exception | None:
    """Return the error if it survives pickling, or else an error with its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AnybatchError(f"{type(error).__name__}: {error}")
    return error


def _raise_if_any(error: Exception | None, group: ProcessGroup | None) -> None:
    """Raise on every rank if any rank has an error; one number is sent where none has."""

    def raise_own() -> None:
        if error is not None:
            raise error

    if all_reduce_max(int(error is not None), group):
        all_gather_object(raise_own, group)
