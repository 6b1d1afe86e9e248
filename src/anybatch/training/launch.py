"""Start the ranks of a training on this machine, watch them, and stop them together.

    this process -> rank 0 .. N-1    work(group), and every SIGINT and SIGTERM
    rank -> this process             the result of work; nothing, if the rank was killed

Ranks are forked from a process that has imported what they need. They have no terminal, so Ctrl-C
reaches only this process. If one rank dies, the others fail at their next collective, and after
`GRACE_SECONDS` the rest are killed. The same happens if one hangs for longer than the patience of
the others. If this process dies, the ranks get SIGTERM.

torch's `elastic_launch` is not used: it kills all ranks at the first signal or failure, so that a
run could not be checkpointed, and the rank that hangs could not be named.
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
from dataclasses import dataclass, field
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

__all__ = ["GRACE_SECONDS", "launch", "use_safe_path"]

_PRELOAD = ("anybatch.training.loop", "torch._dynamo")  # a first update imports the latter
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Work = Callable[[ProcessGroup], Any]
Address = tuple[int, int, str, timedelta]  # rank, number of ranks, store, patience


class _Rank(NamedTuple):
    """A rank, as this process sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


class _Message(NamedTuple):
    """Last message of a rank."""

    result: tuple[Any, ...]  # of work; empty: it raised a RankError
    missing: str | None  # names the rank for which the others waited too long


def launch(
    work: Work, num_ranks: int, *, imports: Sequence[str] = (), patience: timedelta = TIMEOUT
) -> list[Any]:
    """Run `work(group)` on several processes of this machine.

    Each rank gets an equal number of threads, and LOCAL_RANK in its environment.

    Args:
        work: it and its result must pickle.
        imports: modules to import once for all ranks.
        patience: how long a rank waits for another.

    Returns:
        The results, by rank.

    Raises:
        RankError: a rank ended without a result, or the others waited too long for it. The message
            names the first such rank, and the reason.
        KeyboardInterrupt: the same, after a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, *imports])
    method = multiprocessing.get_start_method()
    watch = _Watch()
    with TemporaryDirectory(prefix="anybatch-") as folder, _forward_signals(watch):
        with use_safe_path(), _block_signals():
            for rank in range(num_ranks):
                receiving, sending = context.Pipe(duplex=False)
                address = (rank, num_ranks, f"file://{folder}/store", patience)
                arguments = (work, address, method, sending)
                process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
                process.start()
                sending.close()
                watch.ranks.append(_Rank(process, receiving))
        return watch.wait_for_results()


@contextmanager
def use_safe_path() -> Iterator[None]:
    """Keep new Python processes from importing modules of the current folder.

    The fork server imports the standard library's selectors, for instance. A file selectors.py in a
    stranger's folder must not take its place.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


@dataclass
class _Watch:
    """Watches the ranks until all have ended."""

    ranks: list[_Rank] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)  # that this process got
    results: dict[int, Any] = field(default_factory=dict)  # by rank
    exit_codes: dict[int, int] = field(default_factory=dict)  # of ranks without result, in time
    deadline: float | None = None  # after it the remaining ranks are killed
    killed: set[int] = field(default_factory=set)  # by this process
    missing: str | None = None  # what the others say about a rank that hangs or died

    def set_deadline(self) -> None:
        """Give the ranks some grace from now on; a second call changes nothing."""
        if self.deadline is None:
            self.deadline = time.monotonic() + GRACE_SECONDS

    def wait_for_results(self) -> list[Any]:
        """Wait until all ranks have ended, and return their results."""
        running = dict(enumerate(self.ranks))
        while running:
            wait([thing for r in running.values() for thing in (r.process.sentinel, r.pipe)], 0.5)
            for rank, (process, pipe) in list(running.items()):
                has_ended = not process.is_alive()  # read first: its message comes before its end
                if rank not in self.results and pipe.poll():
                    self.receive(rank, pipe)
                if has_ended:
                    del running[rank]
                    if rank not in self.results:
                        self.exit_codes[rank] = cast(int, process.exitcode)
                        self.set_deadline()
            if self.deadline is not None and time.monotonic() > self.deadline:
                self.killed |= running.keys()
                for process, _ in running.values():
                    process.kill()
        self.check()
        return [self.results[rank] for rank in range(len(self.ranks))]

    def receive(self, rank: int, pipe: Connection) -> None:
        try:
            message: _Message = pipe.recv()
        except EOFError:  # the rank is about to end
            time.sleep(0.01)
            return
        if message.result:
            self.results[rank] = message.result[0]
        if message.missing is not None:
            self.missing = message.missing
            self.set_deadline()

    def check(self) -> None:
        """Raise if a rank has ended without a result."""
        if self.exit_codes and self.signals:
            kind = Terminated if self.signals[-1] == signal.SIGTERM else KeyboardInterrupt
            raise kind("stopped at once; what was checkpointed is kept.")
        if self.exit_codes:
            raise RankError(
                f"{self.find_cause()}. All {len(self.ranks)} ranks must train to the end, so the "
                f"others were stopped. What was made since the newest checkpoint is made again on "
                f"resume."
            )

    def find_cause(self) -> str:
        """Find the rank that ended first by itself, or that the others have missed."""
        alone = {r: code for r, code in self.exit_codes.items() if r not in self.killed}
        # A signal that this process did not send comes before an exit code.
        rank, code = min((alone or self.exit_codes).items(), key=lambda item: item[1] >= 0)
        if self.missing is not None and (code >= 0 or rank in self.killed):
            return self.missing
        if code >= 0:
            return f"rank {rank} ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"rank {rank} was killed by {name}" + (
            " (is memory short?)" if name == "SIGKILL" else ""
        )


@contextmanager
def _block_signals() -> Iterator[None]:
    """Block signals until there are ranks to forward them to.

    The fork server is started here and inherits the block, so that it never gets a signal that goes
    to all processes of a terminal or a service. A rank unblocks them at its start.
    """
    resource_tracker.ensure_running()  # it would unblock SIGINT and SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _forward_signals(watch: _Watch) -> Iterator[None]:
    """Forward signals to the ranks; after a second signal, they have some grace to end."""

    def forward(number: int, frame: FrameType | None) -> None:
        watch.signals.append(number)
        if len(watch.signals) > 1:
            watch.set_deadline()
        for process, _ in watch.ranks:
            if process.is_alive():
                os.kill(cast(int, process.pid), number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process, _ in watch.ranks:
            process.kill()


def _run_rank(work: Work, address: Address, method: str, pipe: Connection) -> None:
    """Run the process of a rank."""
    rank, num_ranks, store, patience = address
    os.setsid()
    multiprocessing.set_start_method(method, force=True)  # for processes that read batches
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)
    _use_loopback()
    torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `_block_signals`
        with distributed.init_group(rank, num_ranks, store, timeout=patience) as group:
            try:
                pipe.send(_Message((work(group),), distributed.describe_failure(group)))
            except RankError:
                pipe.send(_Message((), distributed.describe_failure(group)))
                raise
    except (RankError, KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)  # the launching process reports it, if it is still there


def _use_loopback() -> None:
    """Make the ranks talk over the loopback interface, so that no other machine can listen."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
