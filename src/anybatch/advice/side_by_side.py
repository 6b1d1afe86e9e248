"""Runs side by side: a few processes, each of which makes one run after the other.

The processes are kept from Ctrl-C, which goes to the one that started them; it asks them to stop,
and they save the update at hand. So they do where that process has died. A run that fails, or whose
process dies, takes no other with it. All are forked from a server that has imported torch, and done
nothing with it: it has neither threads nor the context of an accelerator.
"""

import logging
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from anybatch.advice.trial import Outcome, Trial, run_trial
from anybatch.training.launch import use_safe_path

__all__ = ["Ended", "Failed", "Going", "side_by_side"]

Explain = Callable[[BaseException], str | None]

_TELL_SECONDS = 0.1  # between words on how far a run is
_SLOW = ("torch._dynamo", "sklearn.datasets")  # to import; by the server, where they are used

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Going:
    """A run has made so many updates."""

    trial: Trial
    steps: int
    num_steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A run is done."""

    trial: Trial
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Failed:
    """A run could not be made, and why."""

    trial: Trial
    message: str


def side_by_side(
    trials: Sequence[Trial], jobs: int, explain: Explain
) -> Generator[Going | Ended | Failed]:
    """Make runs; closing it, or an error inside, stops and saves those that are going.

    Args:
        jobs: how many processes.
        explain: what to say of an error, None for a defect; importable in another process.

    Yields:
        What happens, as it does.
    """
    waiting, warned = list(reversed(trials)), set[tuple[str, str]]()
    workers: list[_Worker] = []
    try:
        for _ in range(min(jobs, len(trials))):
            workers.append(_Worker(explain))
            workers[-1].give(waiting)
        while busy := {w.connection: w for w in workers if w.trial is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                event = worker.heard(warned)
                if event is not None:
                    yield event
                if isinstance(event, Ended | Failed):
                    if not worker.process.is_alive() and waiting:
                        workers[workers.index(worker)] = worker = _Worker(explain)
                    worker.give(waiting)
    finally:
        _stop(workers)


class _Worker:
    """A process, and the run that it makes."""

    def __init__(self, explain: Explain) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *(name for name in _SLOW if name in sys.modules)])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, explain))
        self.trial: Trial | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # it may begin before it can say that it ignores Ctrl-C, and inherits what is blocked
            with use_safe_path():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def give(self, waiting: list[Trial]) -> None:
        """The next run, if there is one."""
        self.trial = waiting.pop() if waiting else None
        with suppress(OSError):  # a process that has died is heard of
            self.connection.send(self.trial)

    def heard(self, warned: set[tuple[str, str]]) -> Going | Ended | Failed | None:
        """What the process has said; None: a warning, which is passed on unless it has been."""
        assert self.trial is not None
        try:
            kind, what = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Failed(self.trial, _died(self.process.exitcode))
        if kind == "warning":
            if (self.trial.name, what) not in warned:  # what a recipe is warned of, each seed is
                warned.add((self.trial.name, what))
                _log.warning("%s: %s", self.trial.name, what)
            return None
        if kind == "going":
            return Going(self.trial, *what)
        return Ended(self.trial, what) if kind == "ended" else Failed(self.trial, what)


def _died(code: int | None) -> str:
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return (
        f"its process has died ({how}). Is memory short? Take fewer --jobs, and call the same "
        f"command again: it goes on from the last checkpoint."
    )


def _stop(workers: Sequence[_Worker]) -> None:
    """Ask all to save and end; a further Ctrl-C ends them at once."""
    if any(worker.trial is not None for worker in workers):
        _log.warning("stopping after the updates at hand; once more stops at once")
    try:
        for worker in workers:
            worker.process.terminate()
            worker.give([])  # one that waits for a run does not look whether it is to stop
        for worker in workers:
            worker.process.join()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


class _Stop:
    """Whether the process has been asked to stop, or its parent is gone."""

    def __init__(self) -> None:
        self._parent, self._asked = multiprocessing.parent_process(), False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._asked or (self._parent is not None and not self._parent.is_alive())

    def _ask(self, *_: Any) -> None:
        self._asked = True


class _Warnings(logging.Handler):
    """What the library warns of goes to the parent."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("warning", record.getMessage()))


def _work(connection: Connection, explain: Explain) -> None:
    """Make the runs that come, until none does or a stop is asked for."""
    is_stopped = _Stop()
    logging.getLogger("anybatch").addHandler(_Warnings(connection))
    with suppress(EOFError, OSError):  # the parent is gone
        while not is_stopped() and (trial := connection.recv()) is not None:
            try:
                outcome = run_trial(trial, _teller(connection), is_stopped)
            except Exception as error:
                connection.send(("failed", explain(error) or traceback.format_exc()))
            else:
                if outcome is not None:
                    connection.send(("ended", outcome))


def _teller(connection: Connection) -> Callable[[int, int, float], None]:
    last = 0.0

    def tell(steps: int, num_steps: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > _TELL_SECONDS:
            last = time.monotonic()
            with suppress(OSError):  # the parent is gone; the update is to be saved
                connection.send(("going", (steps, num_steps, loss)))

    return tell
