"""The connection of a run's ranks: how they meet, and what is said when one is gone.

A rank that is gone without a word breaks its connections, and one that hangs is waited for as long
as `PATIENCE`: the others then stop with a `RankError` that names it (see `rollcall`).
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from anybatch.distributed import rollcall
from anybatch.errors import AnybatchError

__all__ = [
    "PATIENCE",
    "LostRankError",
    "RankError",
    "connected",
    "device_of",
    "joined",
    "missing",
    "num_ranks",
    "rank_of",
    "watched",
]

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for another: as long as one may take to read its share, to evaluate, or to
write a checkpoint."""

_NEVER_SENT = 2**20  # the tag of a message


class RankError(AnybatchError):
    """Another rank is gone, or has stopped answering."""


class LostRankError(RankError):
    """Another rank is missing, so that nothing can be agreed upon any more."""


def rank_of(group: ProcessGroup | None) -> int:
    """This process's place in the group."""
    return 0 if group is None else dist.get_rank(group)


def num_ranks(group: ProcessGroup | None) -> int:
    """How many processes the group has."""
    return 1 if group is None else dist.get_world_size(group)


@contextmanager
def joined(
    rank: int, ranks: int, init_method: str, *, patience: timedelta = PATIENCE
) -> Iterator[ProcessGroup]:
    """All processes of a run as a group, over gloo.

    A rank that dies stops the others within `rollcall.CALL_SECONDS` of their next collective, and
    one that hangs as long after `patience`; it is then ended too, with its stack on stderr.

    Args:
        init_method: where they meet: "file://..." on one machine, or "env://".
        patience: how long a rank waits for another.

    Raises:
        RankError: they do not meet.
    """
    with connected():
        store, _, _ = next(rendezvous(init_method, rank, ranks))
        store = PrefixStore(rollcall.meeting(store, rank, ranks), store)
        dist.init_process_group("gloo", None, patience, ranks, rank, store)
    group = dist.group.WORLD
    assert group is not None
    with watched(group, ends=True):
        try:
            yield group
        except BaseException as error:
            rollcall.leave(_store(group), rank, error)
            raise
        rollcall.leave(_store(group), rank, None)
    dist.destroy_process_group()  # after an error others may wait for the end of this process


@contextmanager
def watched(group: ProcessGroup | None, *, ends: bool = False) -> Iterator[None]:
    """If another rank waits for this thread in vain, say where it is; see `rollcall.watched`."""
    if group is None:
        yield
    else:
        with rollcall.watched(_store(group), rank_of(group), ends=ends):
            yield


def missing(group: ProcessGroup) -> str | None:
    """Which rank the others have missed, and why, if a collective has failed."""
    try:
        return rollcall.verdict_of(_store(group))
    except RuntimeError:  # the store is gone
        return None


def device_of(group: ProcessGroup) -> torch.device:
    """Where messages of the group are: NCCL has no other than its own."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


@contextmanager
def connected(group: ProcessGroup | None = None) -> Iterator[None]:
    """Errors of the connection in words, with the rank that is missing."""
    begun = time.monotonic()
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's own, waiting too long included
        what = re.sub(r"^\[.*?\] ", "", str(error)).split(". ")[0]  # without a place in C++
        who = "a rank is gone or does not answer"
        if group is not None:
            who = _missed(group, time.monotonic() - begun, "timed out" in what.lower())
        raise LostRankError(
            f"{who}, expected all ranks until the end: {what}. Its "
            f"own output, or that of what started it, says why (killed for want of memory?). Start "
            f"all ranks again: a run goes on from its newest checkpoint."
        ) from error


def _missed(group: ProcessGroup, seconds: float, in_vain: bool) -> str:
    """Which rank is missing, and why."""
    rank, ranks = rank_of(group), num_ranks(group)
    for other in set(range(ranks)) - {rank} if dist.get_backend(group) == "gloo" else ():
        with suppress(RuntimeError):  # a receive in vain closes all connections of gloo: who waits
            nothing = [torch.empty(1)]  # for this rank fails too, rather than when it ends
            group.recv(nothing, other, _NEVER_SENT).wait(timedelta(milliseconds=1))
    found = rollcall.verdict(_store(group), rank, ranks, seconds=seconds, in_vain=in_vain)
    return found or "rank 0, or the torchrun beside it, is gone or out of reach"


def _store(group: ProcessGroup) -> rollcall.Store:
    return cast(rollcall.Store, group.get_group_store())
