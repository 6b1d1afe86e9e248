"""Find out which rank is lost, after a collective has failed.

A collective fails because a connection broke or because it timed out. The rank that notices calls
all ranks through the store in which they met. The answer of each rank lies under its number:

    here        its collective has failed too
    elsewhere   it is alive but not in the collective; a thread, its watcher, tells where it is
    ended       it has ended before, and how
    (nothing)   it was killed or stopped, or its machine is out of reach

All accept the first verdict, of the rank that first has all answers or has waited `CALL_SECONDS`.
Until a collective fails, this costs one read of the store every half second.
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
    "Store",
    "agree_on_prefix",
    "call_ranks",
    "read_verdict",
    "report_exit",
    "watch_thread",
]

START_TIMEOUT = timedelta(minutes=15)
"""Longest time between the starts of two ranks."""

CALL_SECONDS = 3.0
"""Time that ranks have to answer a call. Those that do not answer are lost."""
GRACE_SECONDS = 10.0
"""Time that the other ranks have to end by themselves once a rank is lost."""

_POLL_SECONDS = 0.5  # between two reads of the store by a watcher
_READING_SECONDS = 0.3  # rank 0 may host the store, so it stays until others have read the verdict
_JOINING_SECONDS = 1.0  # a rank in the collective notices within this time that it has failed
_OPEN, _VERDICT = "anybatch/call", "anybatch/verdict"
_LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")  # names of paths in `sysconfig`


class Store(Protocol):
    """Key-value store of torch.distributed, which all ranks can read and write."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class _Answer(NamedTuple):
    state: str  # here, elsewhere, ended
    text: str = ""
    seconds: float = 0.0  # that the rank has waited in the collective
    timed_out: bool = False


class _Verdict(NamedTuple):
    text: str
    awaited: list[int]  # ranks, perhaps alive, for which the others waited until the timeout


def agree_on_prefix(store: Store, rank: int, ranks: int) -> str:
    """Agree on a prefix for the keys of this start of the ranks.

    A store may be used again after a restart. It then holds addresses of processes that are gone,
    so each start needs keys of its own. Rank 0 proposes a prefix. The others answer the newest
    proposal in the store until rank 0 confirms that it has read their answer.
    """
    token = uuid4().hex
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    if rank == 0:
        store.set("call", token)
        store.wait([f"{token}/answer/{other}" for other in range(1, ranks)], START_TIMEOUT)
        for other in range(1, ranks):
            store.set(f"{token}/heard/{store.get(f'{token}/answer/{other}').decode()}", "")
        return token
    while time.monotonic() < deadline:
        if store.check(["call"]):
            prefix = store.get("call").decode()
            store.set(f"{prefix}/answer/{rank}", token)
            if store.check([f"{prefix}/heard/{token}"]):
                return prefix
        time.sleep(0.01)
    raise RuntimeError(f"rank 0 has not called for {START_TIMEOUT}")


def call_ranks(
    store: Store, rank: int, ranks: int, *, seconds: float, timed_out: bool
) -> str | None:
    """Call all ranks, or answer their call, and return which rank is lost.

    Args:
        seconds: that this rank has waited in the collective that failed.
        timed_out: whether it failed by a timeout, rather than by a broken connection.

    Returns:
        The same text on every rank that answers; None if the store is gone, or does not answer
        within twice `CALL_SECONDS`.
    """
    answer = _Answer("here", "", seconds, timed_out)
    return _run_with_timeout(lambda: _agree_on_verdict(store, rank, ranks, answer))


def _agree_on_verdict(store: Store, rank: int, ranks: int, answer: _Answer) -> str:
    store.set(_key(rank), json.dumps(answer))
    store.set(_OPEN, "")
    deadline, answers = time.monotonic() + CALL_SECONDS, dict[int, _Answer]()
    while not store.check([_VERDICT]):
        for other in set(range(ranks)) - answers.keys():
            if store.check([_key(other)]):
                answers[other] = _Answer(*json.loads(store.get(_key(other))))
        if len(answers) == ranks or time.monotonic() > deadline:
            # Only the first verdict is stored; later ones are dropped.
            store.compare_set(_VERDICT, "", json.dumps(_judge(answers, ranks)))
        time.sleep(0.02)
    if rank == 0:
        time.sleep(_READING_SECONDS)
    return _load_verdict(store).text


def read_verdict(store: Store) -> str | None:
    """Return the verdict on the lost rank; None if there was no call."""
    return _load_verdict(store).text if store.check([_VERDICT]) else None


def report_exit(store: Store, rank: int, error: BaseException | None) -> None:
    """Tell the others that this rank joins no more collectives, and by which error it ended."""
    cause = "" if error is None else f" by {type(error).__name__}: {error}"
    answer = json.dumps(_Answer("ended", cause))
    _run_with_timeout(lambda: store.compare_set(_key(rank), "", answer).decode())


@contextmanager
def watch_thread(store: Store, rank: int, *, exits: bool) -> Iterator[None]:
    """Answer calls for this thread while it is busy elsewhere.

    Args:
        exits: whether to end the process after others have timed out waiting for it, with exit
            code 1 and its stack on stderr.
    """
    done = threading.Event()
    arguments = (store, rank, threading.get_ident(), done, exits)
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(_POLL_SECONDS)  # no longer: the store may have stopped answering


def _watch(store: Store, rank: int, thread: int, done: threading.Event, exits: bool) -> None:
    with suppress(RuntimeError):  # the store is gone: nobody is left to answer
        while not store.check([_OPEN]):
            if done.wait(_POLL_SECONDS):
                return
        if done.wait(_JOINING_SECONDS):
            return
        # If the thread has answered by itself, its answer stays.
        answer = _Answer("elsewhere", _locate_thread(thread))
        store.compare_set(_key(rank), "", json.dumps(answer))
        while not store.check([_VERDICT]):
            if done.wait(_POLL_SECONDS):
                return
        is_awaited = rank in _load_verdict(store).awaited
        if exits and is_awaited and not done.wait(_JOINING_SECONDS):
            print(f"anybatch: the others timed out waiting for rank {rank}", file=sys.stderr)
            traceback.print_stack(sys._current_frames()[thread])
            sys.stderr.flush()
            os._exit(1)


def _judge(answers: Mapping[int, _Answer], ranks: int) -> _Verdict:
    """Name the ranks that are lost, by the answers of all ranks."""
    ended = {rank: answer.text for rank, answer in answers.items() if answer.state == "ended"}
    places = {rank: answer.text for rank, answer in answers.items() if answer.state == "elsewhere"}
    silent = sorted(set(range(ranks)) - answers.keys())
    waits = [answer.seconds for answer in answers.values() if answer.timed_out]
    texts = [f"rank {rank} has ended before the others{cause}" for rank, cause in ended.items()]
    if waits:
        absent = f"has not come to the others, which waited {max(waits):.0f} s"
        texts += [f"rank {rank} {absent}: it was at {place}" for rank, place in places.items()]
        texts += [f"rank {rank} {absent}, and is stopped or out of reach" for rank in silent]
    else:
        texts += [f"rank {rank} is gone: killed, or its machine is out of reach" for rank in silent]
    if not texts and waits:
        last = min(answers, key=lambda rank: answers[rank].seconds)
        texts = [f"rank {last} came too late to the others, which waited {max(waits):.0f} s"]
    text = "; ".join(texts) or "a connection broke between ranks that are all there"
    return _Verdict(text, sorted({*places, *silent}) if waits else [])


def _run_with_timeout(ask: Callable[[], str]) -> str | None:
    """Return what the store answers; None if it is gone or does not answer in time."""
    answers = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * CALL_SECONDS)
    return answers[0] if answers else None


def _load_verdict(store: Store) -> _Verdict:
    return _Verdict(*json.loads(store.get(_VERDICT)))


def _locate_thread(thread: int) -> str:
    """Return the line that a thread is at: the user's own code if there is some on its stack."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    user = [frame for frame in stack if _is_user_code(frame.filename)]
    frame = (user or stack)[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}"


def _is_user_code(file: str) -> bool:
    libraries = [Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in _LIBRARIES)]
    return not file.startswith("<") and not any(map(Path(file).is_relative_to, libraries))


def _key(rank: int) -> str:
    return f"anybatch/answer/{rank}"
