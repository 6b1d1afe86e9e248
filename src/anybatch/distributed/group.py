"""Process group of a run.

If a rank dies, its connections break. If it hangs, the others wait for `TIMEOUT`. Both times they
stop with a `RankError` that names the lost rank (see `failures`).
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

from anybatch.distributed import failures
from anybatch.errors import AnybatchError

__all__ = [
    "TIMEOUT",
    "LostRankError",
    "RankError",
    "describe_failure",
    "get_device",
    "get_num_ranks",
    "get_rank",
    "get_world",
    "init_group",
    "translate_connection_errors",
    "watch_thread",
]

TIMEOUT = timedelta(minutes=10)
"""Time that a rank waits for another. A rank may take as long to read its share, to evaluate,
or to write a checkpoint."""

_UNUSED_TAG = 2**20  # no rank ever sends a message with this tag


class RankError(AnybatchError):
    """Another rank has failed or has stopped answering."""


class LostRankError(RankError):
    """Another rank is lost, so further collectives would fail."""


def get_rank(group: ProcessGroup | None) -> int:
    """Return this process's rank in the group; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


def get_world(num_ranks: int) -> ProcessGroup | None:
    """Return the group of all ranks; None if there is one process alone."""
    return dist.group.WORLD if num_ranks > 1 else None


def get_num_ranks(group: ProcessGroup | None) -> int:
    """Return the number of ranks in the group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


@contextmanager
def init_group(
    rank: int, ranks: int, init_method: str, *, timeout: timedelta = TIMEOUT
) -> Iterator[ProcessGroup]:
    """Open a gloo process group of all ranks, and close it at the end.

    If a rank dies, the others stop within `failures.CALL_SECONDS` of their next collective. If a
    rank hangs, they stop that long after `timeout`; the rank that hangs is then ended too, with its
    stack on stderr.

    Args:
        init_method: how the ranks find each other: "file://..." on one machine, or "env://".
        timeout: how long a rank waits for another.

    Raises:
        RankError: the ranks do not find each other.
    """
    with translate_connection_errors():
        store, _, _ = next(rendezvous(init_method, rank, ranks))
        store = PrefixStore(failures.agree_on_prefix(store, rank, ranks), store)
        dist.init_process_group("gloo", None, timeout, ranks, rank, store)
    group = dist.group.WORLD
    assert group is not None
    with watch_thread(group, exits=True):
        try:
            yield group
        except BaseException as error:
            failures.report_exit(_get_store(group), rank, error)
            raise
        failures.report_exit(_get_store(group), rank, None)
    # Not in a `finally`: after an error it might wait for ranks that wait for this process to end.
    dist.destroy_process_group()


@contextmanager
def watch_thread(group: ProcessGroup | None, *, exits: bool = False) -> Iterator[None]:
    """Tell the other ranks where this thread is if they time out waiting for it.

    Args:
        exits: see `failures.watch_thread`.
    """
    if group is None:
        yield
    else:
        with failures.watch_thread(_get_store(group), get_rank(group), exits=exits):
            yield


def describe_failure(group: ProcessGroup) -> str | None:
    """Describe which rank was lost, and why; None if no collective has failed."""
    try:
        return failures.read_verdict(_get_store(group))
    except RuntimeError:  # the store is gone
        return None


def get_device(group: ProcessGroup) -> torch.device:
    """Return the device of the group's messages: NCCL sends from CUDA memory only."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


@contextmanager
def translate_connection_errors(group: ProcessGroup | None = None) -> Iterator[None]:
    """Turn an error of gloo or NCCL, timeouts included, into one that names the lost rank."""
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error)).split(". ")[0]  # drops the place in C++
        loss = "a rank is gone or does not answer"
        if group is not None:
            timed_out = "timed out" in reason.lower()
            loss = _find_lost_rank(group, time.monotonic() - start, timed_out=timed_out)
        raise LostRankError(
            f"{loss}. The collective failed with: {reason}. The lost rank's own output, or that of "
            f"its launcher, may say why (was it killed when memory ran out?). Start all ranks "
            f"again: a run continues from its newest checkpoint."
        ) from error


def _find_lost_rank(group: ProcessGroup, seconds: float, *, timed_out: bool) -> str:
    """Describe which rank is lost, and why."""
    rank, ranks = get_rank(group), get_num_ranks(group)
    for other in set(range(ranks)) - {rank} if dist.get_backend(group) == "gloo" else ():
        # A receive that times out closes all connections of gloo. So ranks that wait for this one
        # fail now, rather than when this process ends.
        with suppress(RuntimeError):
            group.recv([torch.empty(1)], other, _UNUSED_TAG).wait(timedelta(milliseconds=1))
    verdict = failures.call_ranks(
        _get_store(group), rank, ranks, seconds=seconds, timed_out=timed_out
    )
    return verdict or "rank 0, or its torchrun, is gone or out of reach"


def _get_store(group: ProcessGroup) -> failures.Store:
    return cast(failures.Store, group.get_group_store())
