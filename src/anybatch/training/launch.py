"""Ranks on one machine: started, watched and stopped together.

    this process -> rank 0 .. N-1    work(group), and every SIGINT and SIGTERM
    rank -> this process             what work has returned; nothing, if the rank was killed

Ranks are forked from a process that has imported what they need, and have no terminal, so that
Ctrl-C comes to this process alone. One that is gone stops the others: they fail at their next
collective, and what is left of them after `GRACE_SECONDS` is killed. So does one that hangs, once
the others have waited for it as long as their patience. If this process is gone, the ranks are told
to terminate.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple, cast

import torch

from anybatch import distributed
from anybatch.distributed import TIMEOUT, ProcessGroup, RankError
from anybatch.distributed.failures import GRACE_SECONDS
from anybatch.errors import Terminated

__all__ = ["GRACE_SECONDS", "launch", "safe_path"]

_IMPORTED = ("anybatch.training.steps", "torch._dynamo")  # the latter by a first update
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Work = Callable[[ProcessGroup], Any]


class _Started(NamedTuple):
    """A rank, as this process sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


class _Told(NamedTuple):
    """What a rank says at its end."""

    returned: tuple[Any, ...]  # what work has; empty: it raised a RankError
    missing: str | None  # which rank the others have waited for in vain


def launch(
    work: Work, num_ranks: int, *, imports: Sequence[str] = (), patience: timedelta = TIMEOUT
) -> list[Any]:
    """`work(group)` on so many processes of this machine.

    Each has its part of the cores for threads, and LOCAL_RANK in its environment.

    Args:
        work: and what it returns must pickle.
        imports: modules that it needs, to be imported once for all ranks.
        patience: how long a rank waits for another.

    Returns:
        What it returned, by rank.

    Raises:
        RankError: naming the first rank that ended without returning, or for which the others
            waited in vain, and why.
        KeyboardInterrupt: the same where signals came before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, *imports])
    method = multiprocessing.get_start_method()
    started: list[_Started] = []
    with (
        TemporaryDirectory(prefix="anybatch-") as folder,
        _signals_passed_on(started) as asked,
    ):
        with safe_path(), _held_back():
            for rank in range(num_ranks):
                receiving, sending = context.Pipe(duplex=False)
                where = (rank, num_ranks, f"file://{folder}/store", patience)
                arguments = (work, where, method, sending)
                process = context.Process(target=_rank, args=arguments, name=f"rank {rank}")
                process.start()
                sending.close()
                started.append(_Started(process, receiving))
        return _returned(started, asked)


@contextmanager
def safe_path() -> Iterator[None]:
    """Let Python processes that start meanwhile not look for modules in the current folder.

    The server that ranks are forked from would take a stranger's selectors.py there for that of
    the standard library.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


class _Asked:
    """What the ranks have been asked to do, and when those that are left are killed."""

    times: int = 0  # to stop
    number: int | None = None  # of the last signal that said so
    deadline: float | None = None
    missing: str | None = None  # what they say of a rank that they have missed
    killed: frozenset[int] = frozenset()  # by this process

    def hurry(self) -> None:
        """Some grace from now on, or since it was said first."""
        if self.deadline is None:
            self.deadline = time.monotonic() + GRACE_SECONDS


def _returned(started: list[_Started], asked: _Asked) -> list[Any]:
    """What all have returned, once all have ended."""
    told: dict[int, Any] = {}
    gone: dict[int, int] = {}  # exit codes by rank, in the order in which they were found
    left = dict(enumerate(started))
    while left:
        wait([thing for one in left.values() for thing in (one.process.sentinel, one.pipe)], 0.5)
        for rank, one in list(left.items()):
            is_over = not one.process.is_alive()
            if rank not in told and one.pipe.poll():
                _receive(one.pipe, rank, told, asked)
            if is_over:
                del left[rank]
                if rank not in told:
                    gone[rank] = cast(int, one.process.exitcode)
                    asked.hurry()
        if asked.deadline is not None and time.monotonic() > asked.deadline:
            asked.killed |= left.keys()
            for one in left.values():
                one.process.kill()
    if gone and asked.times:
        kind = Terminated if asked.number == signal.SIGTERM else KeyboardInterrupt
        raise kind("stopped at once; what was checkpointed is kept.")
    if gone:
        raise RankError(
            f"{_cause(gone, asked)}, expected all {len(started)} ranks to train to the end. The "
            f"others were stopped. What was made since the newest checkpoint is made again on "
            f"resume."
        )
    return [told[rank] for rank in range(len(started))]


def _cause(gone: dict[int, int], asked: _Asked) -> str:
    """Of those that are gone: a signal that nobody sent from here, what the others have missed, or
    else the first.
    """
    by_itself = {rank: code for rank, code in gone.items() if rank not in asked.killed} or gone
    rank, code = min(by_itself.items(), key=lambda item: item[1] >= 0)
    if asked.missing is not None and (code >= 0 or rank in asked.killed):
        return asked.missing
    return f"rank {rank} {_how_it_ended(code)}"


def _receive(pipe: Connection, rank: int, told: dict[int, Any], asked: _Asked) -> None:
    try:
        said: _Told = pipe.recv()
    except EOFError:  # its end is closed: it is about to be over
        time.sleep(0.01)
        return
    if said.returned:
        told[rank] = said.returned[0]
    if said.missing is not None:
        asked.missing = said.missing
        asked.hurry()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (is memory short?)" if name == "SIGKILL" else "")


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until there are ranks to pass them on to.

    What forks the ranks is started in it and never gets them, also where they come to all
    processes of a terminal or a service; a rank takes them once it has begun.
    """
    resource_tracker.ensure_running()  # it lets SIGINT and SIGTERM through again
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _signals_passed_on(started: list[_Started]) -> Iterator[_Asked]:
    """Ranks get the signals of this process; after a second one, they have some grace."""
    asked = _Asked()

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.times += 1
        asked.number = number
        if asked.times > 1:
            asked.hurry()
        for process, _ in started:
            if process.is_alive():
                os.kill(cast(int, process.pid), number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process, _ in started:
            process.kill()


Where = tuple[int, int, str, timedelta]  # the arguments of `joined`


def _rank(work: Work, where: Where, method: str, pipe: Connection) -> None:
    """What runs in the process of a rank."""
    rank, num_ranks, store, patience = where
    os.setsid()
    multiprocessing.set_start_method(method, force=True)  # of those that read ahead
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    _stay_on_this_machine()
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `_held_back`
        with distributed.init_group(rank, num_ranks, store, timeout=patience) as group:
            try:
                pipe.send(_Told((work(group),), distributed.describe_failure(group)))
            except RankError:
                pipe.send(_Told((), distributed.describe_failure(group)))
                raise
    except (RankError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)  # which the other process tells, if it is still there


def _stay_on_this_machine() -> None:
    """Ranks talk over the loopback interface, if there is one: no other machine can listen."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
