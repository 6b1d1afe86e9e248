"""Ranks on one machine: started, watched and stopped together.

    this process -> rank 0 .. N-1    work(group), and every SIGINT and SIGTERM
    rank -> this process             what work has returned; nothing, if the rank was killed

Ranks are forked from a process that has imported what they need, and have no terminal, so that
Ctrl-C comes to this process alone. One that is gone stops the others: they fail at their next
collective, and what is left of them after `GRACE_SECONDS` is killed. If this process is gone, the
ranks are told to terminate.
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
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple, cast

import torch

from anybatch import distributed
from anybatch.distributed import ProcessGroup, RankError

__all__ = ["GRACE_SECONDS", "launch"]

GRACE_SECONDS = 10.0
"""How long the others have to end by themselves once a rank is gone."""

_IMPORTED = ("anybatch.training.steps", "torch._dynamo")  # the latter by a first update
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Work = Callable[[ProcessGroup], Any]


class _Started(NamedTuple):
    """A rank, as this process sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


def launch(work: Work, num_ranks: int, *, imports: Sequence[str] = ()) -> list[Any]:
    """`work(group)` on so many processes of this machine.

    Each has its part of the cores for threads, and LOCAL_RANK in its environment.

    Args:
        work: and what it returns must pickle.
        imports: modules that it needs, to be imported once for all ranks.

    Returns:
        What it returned, by rank.

    Raises:
        RankError: naming the first rank that ended without returning, and why.
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
        with _held_back():
            for rank in range(num_ranks):
                receiving, sending = context.Pipe(duplex=False)
                arguments = (work, rank, num_ranks, f"file://{folder}/store", method, sending)
                process = context.Process(target=_rank, args=arguments, name=f"rank {rank}")
                process.start()
                sending.close()
                started.append(_Started(process, receiving))
        return _returned(started, asked)


class _Asked:
    """What the ranks have been asked to do, and when those that are left are killed."""

    times: int = 0  # to stop
    deadline: float | None = None

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
                _receive(one.pipe, rank, told)
            if is_over:
                del left[rank]
                if rank not in told:
                    gone[rank] = cast(int, one.process.exitcode)
                    asked.hurry()
        if asked.deadline is not None and time.monotonic() > asked.deadline:
            for one in left.values():
                one.process.kill()
    if gone and asked.times:
        raise KeyboardInterrupt("stopped at once; what was checkpointed is kept.")
    if gone:
        rank, code = min(gone.items(), key=lambda item: item[1] >= 0)  # the cause: a signal's, or
        raise RankError(  # else the first
            f"rank {rank} {_how_it_ended(code)}, expected all {len(started)} ranks to train to the "
            f"end. The others were stopped. What was made since the newest checkpoint is made "
            f"again on resume."
        )
    return [told[rank] for rank in range(len(started))]


def _receive(pipe: Connection, rank: int, told: dict[int, Any]) -> None:
    try:
        told[rank] = pipe.recv()
    except EOFError:  # its end is closed: it is about to be over
        time.sleep(0.01)


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


def _rank(work: Work, rank: int, num_ranks: int, store: str, method: str, pipe: Connection) -> None:
    """What runs in the process of a rank."""
    os.setsid()
    multiprocessing.set_start_method(method, force=True)  # of those that read ahead
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    _stay_on_this_machine()
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `_held_back`
        with distributed.joined(rank, num_ranks, store) as group:
            pipe.send(work(group))
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
