"""Ranks that find one another, and which of them is missing, where others wait for it in vain.

A collective that fails, because a connection broke or after waiting too long, opens a call. What
each rank answers lies under its number in the store in which the ranks have met:

    here        its collective has failed too
    elsewhere   it has not come, but lives: its watcher, a thread, tells where it is
    ended       it has left before, and how
    (nothing)   it was killed or stopped, or its machine is out of reach

All agree on one verdict, that of the first to have heard enough: every answer, or `CALL_SECONDS`.
Until a collective fails, the price is one look into the store every half second.
"""

import json
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import uuid4

__all__ = [
    "CALL_SECONDS",
    "GRACE_SECONDS",
    "MEETING",
    "Store",
    "leave",
    "meeting",
    "verdict",
    "verdict_of",
    "watched",
]

MEETING = timedelta(minutes=15)
"""As far apart ranks may start."""

CALL_SECONDS = 3.0
"""How long the call is open: after it the missing are named."""
GRACE_SECONDS = 10.0
"""How long the others have to end by themselves once a rank is missing."""

_POLL_SECONDS = 0.5  # between looks of a watcher
_READING_SECONDS = 0.3  # that rank 0 stays, which may be the one to keep the store
_HEARING_SECONDS = 1.0  # until a rank that waits with the others has heard of a call by itself
_OPEN, _VERDICT = "anybatch/call", "anybatch/verdict"
_LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")  # as `sysconfig` names them


class Store(Protocol):
    """What all ranks can read and write: one of torch.distributed's."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class _Answer(NamedTuple):
    state: str  # here, elsewhere, ended
    words: str = ""
    seconds: float = 0.0  # that it has waited
    in_vain: bool = False  # until its patience was at an end


class _Verdict(NamedTuple):
    words: str
    missed: list[int]  # ranks that live, or may, and have been waited for in vain


def meeting(store: Store, rank: int, ranks: int) -> str:
    """A name that the ranks of this start share, and no earlier one's: a store may be used again
    after a restart, with the addresses of processes that are gone in it.

    Rank 0 calls; others answer the last call that they see, until it is one that hears them.
    """
    own = uuid4().hex
    deadline = time.monotonic() + MEETING.total_seconds()
    if rank == 0:
        store.set("call", own)
        store.wait([f"{own}/answer/{other}" for other in range(1, ranks)], MEETING)
        for other in range(1, ranks):
            store.set(f"{own}/heard/{store.get(f'{own}/answer/{other}').decode()}", "")
        return own
    while time.monotonic() < deadline:
        if store.check(["call"]):
            call = store.get("call").decode()
            store.set(f"{call}/answer/{rank}", own)
            if store.check([f"{call}/heard/{own}"]):
                return call
        time.sleep(0.01)
    raise RuntimeError(f"rank 0 has not called for {MEETING}")


def verdict(store: Store, rank: int, ranks: int, *, seconds: float, in_vain: bool) -> str | None:
    """Open the call, or answer it; who is missing, the same words on every rank that answers.

    Args:
        seconds: that this rank has waited in the collective that failed.
        in_vain: whether it failed by waiting too long, rather than by a connection that broke.

    Returns:
        It; None where the store is gone, or does not answer within twice `CALL_SECONDS`.
    """
    own = _Answer("here", "", seconds, in_vain)
    return _if_it_answers(lambda: _call(store, rank, ranks, own))


def _call(store: Store, rank: int, ranks: int, own: _Answer) -> str:
    store.set(_key(rank), json.dumps(own))
    store.set(_OPEN, "")
    deadline, answers = time.monotonic() + CALL_SECONDS, dict[int, _Answer]()
    while not store.check([_VERDICT]):
        for other in set(range(ranks)) - answers.keys():
            if store.check([_key(other)]):
                answers[other] = _Answer(*json.loads(store.get(_key(other))))
        if len(answers) == ranks or time.monotonic() > deadline:
            store.compare_set(_VERDICT, "", json.dumps(_found(answers, ranks)))  # the first's
        time.sleep(0.02)
    if rank == 0:
        time.sleep(_READING_SECONDS)
    return _verdict(store).words


def verdict_of(store: Store) -> str | None:
    """What the ranks have found, if there has been a call."""
    return _verdict(store).words if store.check([_VERDICT]) else None


def leave(store: Store, rank: int, error: BaseException | None) -> None:
    """Say that this rank waits for no other any more, and why."""
    how = "" if error is None else f" by {type(error).__name__}: {error}"
    own = json.dumps(_Answer("ended", how))
    _if_it_answers(lambda: store.compare_set(_key(rank), "", own).decode())


@contextmanager
def watched(store: Store, rank: int, *, ends: bool) -> Iterator[None]:
    """Answer for this thread while it cannot.

    Args:
        ends: whether the process ends where others have waited for it in vain, with exit code 1
            and its stack on stderr.
    """
    over = threading.Event()
    arguments = (store, rank, threading.get_ident(), over, ends)
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(_POLL_SECONDS)  # no longer where the store does not answer


def _watch(store: Store, rank: int, watched: int, over: threading.Event, ends: bool) -> None:
    with suppress(RuntimeError):  # the store is gone: nobody is left to answer
        while not store.check([_OPEN]):
            if over.wait(_POLL_SECONDS):
                return
        if over.wait(_HEARING_SECONDS):
            return
        store.compare_set(_key(rank), "", json.dumps(_Answer("elsewhere", _place(watched))))
        while not store.check([_VERDICT]):
            if over.wait(_POLL_SECONDS):
                return
        is_missed = rank in _verdict(store).missed
        if ends and is_missed and not over.wait(_HEARING_SECONDS):
            words = f"rank {rank} was waited for in vain, and ends here:"
            print(f"anybatch: {words}", file=sys.stderr)
            traceback.print_stack(sys._current_frames()[watched])
            sys.stderr.flush()
            os._exit(1)


def _found(answers: Mapping[int, _Answer], ranks: int) -> _Verdict:
    ended = {rank: one.words for rank, one in answers.items() if one.state == "ended"}
    elsewhere = {rank: one.words for rank, one in answers.items() if one.state == "elsewhere"}
    silent = sorted(set(range(ranks)) - answers.keys())
    in_vain = [one.seconds for one in answers.values() if one.in_vain]
    missed = sorted({*elsewhere, *silent}) if in_vain else []
    vainly = f"has not come to the others, which waited {max(in_vain, default=0):.0f} s"
    found = [f"rank {rank} has ended before the others{how}" for rank, how in ended.items()]
    if in_vain:
        found += [f"rank {rank} {vainly}: it was at {where}" for rank, where in elsewhere.items()]
        found += [f"rank {rank} {vainly}, and is stopped or out of reach" for rank in silent]
    else:
        found += [f"rank {rank} is gone: killed, or its machine is out of reach" for rank in silent]
    if not found and in_vain:
        last = min(answers, key=lambda rank: answers[rank].seconds)
        found = [f"rank {last} came too late to the others, which waited {max(in_vain):.0f} s"]
    words = "; ".join(found) or "a connection broke between ranks that are all there"
    return _Verdict(words, missed)


def _if_it_answers(ask: Callable[[], str]) -> str | None:
    """What a store says; None where it is gone or out of reach, which it may not tell for long."""
    told = []

    def asked() -> None:
        with suppress(RuntimeError):
            told.append(ask())

    asking = threading.Thread(target=asked, daemon=True)
    asking.start()
    asking.join(2 * CALL_SECONDS)
    return told[0] if told else None


def _verdict(store: Store) -> _Verdict:
    return _Verdict(*json.loads(store.get(_VERDICT)))


def _place(thread: int) -> str:
    """Where a thread is, in the user's own code if there is some."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    own = [frame for frame in stack if _is_own(frame.filename)]
    frame = (own or stack)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}"


def _is_own(file: str) -> bool:
    others: list[Path | str] = [
        Path(__file__).parent,
        *(sysconfig.get_path(name) for name in _LIBRARIES),
    ]
    return not file.startswith("<") and not any(map(Path(file).is_relative_to, others))


def _key(rank: int) -> str:
    return f"anybatch/answer/{rank}"
