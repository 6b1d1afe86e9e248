"""Ranks: the only importer of torch.distributed.

`group=None` means this process alone, and every function is then the identity. Errors are
agreed upon before a collective, so that no rank waits for one that has given up.
"""

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from anybatch.errors import AnybatchError

__all__ = ["ProcessGroup", "all_sum", "everywhere", "rank_of"]

T = TypeVar("T")


def rank_of(group: ProcessGroup | None) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def everywhere(work: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `work()` returns on every rank, in order; fails on all of them if it fails on one.

    Args:
        work: returns something small that pickles, with tensors on the CPU.

    Raises:
        Exception: that of the first rank that failed, on every rank, with a note naming it: all
            must go the same way, also where they failed in different ways.
    """
    if group is None:
        return [work()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (_portable(error), result), group=group)
    for rank, (raised, _) in enumerate(told):
        if raised is not None:
            first = error if error is not None and rank == rank_of(group) else raised
            first.add_note(f"raised on rank {rank}")
            raise first
    return [result for _, result in told]


def all_sum(tensors: Sequence[Tensor], group: ProcessGroup | None) -> None:
    """Add up each tensor over the ranks, in place, in one message a dtype."""
    if group is None:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [t.numel() for t in same])
        for tensor, piece in zip(same, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _portable(error: Exception | None) -> Exception | None:
    """The error itself where it survives pickling, its words otherwise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AnybatchError(f"{type(error).__name__}: {error}")
    return error
