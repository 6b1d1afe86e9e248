"""Train runs side by side, in a few processes.

The processes ignore Ctrl-C, which goes to their parent. It asks them to stop, and they save after
the update at hand. They do the same if the parent has died. A run that fails, or whose process
dies, does not affect the others. All processes are forked from a server that has imported torch
and done nothing with it, so it has neither threads nor the context of an accelerator.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from anybatch.advice.trial import Outcome, Trial, train_trial
from anybatch.limits import max_processes
from anybatch.training.launch import use_safe_path

__all__ = ["Ended", "Failed", "Update", "count_jobs", "train_side_by_side"]

DescribeError = Callable[[BaseException], str | None]

_REPORT_SECONDS = 0.1  # between reports of a run
_SLOW_IMPORTS = ("torch._dynamo", "sklearn.datasets")  # by the server, if the parent has them

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Update:
    """Event: a run has made some updates."""

    trial: Trial
    steps: int
    num_steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Event: a run has ended."""

    trial: Trial
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: a run has failed."""

    trial: Trial
    message: str


def count_jobs(trials: Sequence[Trial]) -> int:
    """Count how many runs can train at a time: as threads allow; one on an accelerator."""
    if any(trial.recipe.run.device != "cpu" for trial in trials):
        return 1
    threads = max(trial.recipe.run.threads or 1 for trial in trials)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // threads, 1)


def train_side_by_side(
    trials: Sequence[Trial], num_jobs: int, describe_error: DescribeError
) -> Generator[Update | Ended | Failed]:
    """Train runs. If the generator is closed, the runs in training are saved and stopped.

    Args:
        describe_error: returns the message about an error, None for a defect; importable in
            another process.

    Yields:
        Events, as they happen.
    """
    num_jobs = min(num_jobs, max_processes(), len(trials))
    queue, warnings = list(reversed(trials)), set[tuple[str, str]]()
    workers: list[_Worker] = []
    try:
        for _ in range(num_jobs):
            workers.append(_Worker(describe_error))
            workers[-1].assign(queue)
        while busy := {w.connection: w for w in workers if w.trial is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                event = worker.receive(warnings)
                if event is not None:
                    yield event
                if isinstance(event, Ended | Failed):
                    if not worker.process.is_alive() and queue:
                        workers[workers.index(worker)] = worker = _Worker(describe_error)
                    worker.assign(queue)
    finally:
        _stop_workers(workers)


class _Worker:
    """Process, and the run that it trains."""

    def __init__(self, describe_error: DescribeError) -> None:
        context = multiprocessing.get_context("forkserver")
        slow = [name for name in _SLOW_IMPORTS if name in sys.modules]
        context.set_forkserver_preload([__name__, *slow])
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=_make_runs, args=(child_end, describe_error))
        self.trial: Trial | None = None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # the child inherits the blocked signals, until it can ignore Ctrl-C itself
            with use_safe_path():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child_end.close()

    def assign(self, queue: list[Trial]) -> None:
        """Assign the next run, if there is one."""
        self.trial = queue.pop() if queue else None
        with suppress(OSError):  # a dead process shows when its pipe is read
            self.connection.send(self.trial)

    def receive(self, warnings: set[tuple[str, str]]) -> Update | Ended | Failed | None:
        """Receive an event. A warning is logged, unless it was before, and None returned."""
        assert self.trial is not None
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Failed(self.trial, _describe_death(self.process.exitcode))
        if kind == "warning":
            if (self.trial.name, content) not in warnings:  # each seed of a recipe has the same
                warnings.add((self.trial.name, content))
                _log.warning("%s: %s", self.trial.name, content)
            return None
        if kind == "update":
            return Update(self.trial, *content)
        return Ended(self.trial, content) if kind == "ended" else Failed(self.trial, content)


def _describe_death(code: int | None) -> str:
    cause = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return (
        f"its process has died ({cause}). Is memory short? Use fewer --jobs, and run the same "
        f"command again: it continues from the last checkpoint."
    )


def _stop_workers(workers: Sequence[_Worker]) -> None:
    """Ask all processes to save and end. A second Ctrl-C kills them at once."""
    if any(worker.trial is not None for worker in workers):
        _log.warning("stopping after the updates at hand; once more stops at once")
    try:
        for worker in workers:
            worker.process.terminate()
            worker.assign([])  # one that waits for a run does not check whether to stop
        for worker in workers:
            worker.process.join()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


class _Stop:
    """Flag in a child process: it was asked to stop, or its parent has died."""

    def __init__(self) -> None:
        self._parent, self._is_asked = multiprocessing.parent_process(), False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._is_asked or (self._parent is not None and not self._parent.is_alive())

    def _ask(self, *_: Any) -> None:
        self._is_asked = True


class _Warnings(logging.Handler):
    """Handler that sends the library's warnings to the parent."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(("warning", record.getMessage()))


def _make_runs(connection: Connection, describe_error: DescribeError) -> None:
    """Train the runs that arrive, until none does or the process is asked to stop."""
    is_stopped = _Stop()
    logging.getLogger("anybatch").addHandler(_Warnings(connection))
    with suppress(EOFError, OSError):  # the parent has died
        while not is_stopped() and (trial := connection.recv()) is not None:
            try:
                outcome = train_trial(trial, _make_reporter(connection), is_stopped)
            except Exception as error:
                connection.send(("failed", describe_error(error) or traceback.format_exc()))
            else:
                if outcome is not None:
                    connection.send(("ended", outcome))


def _make_reporter(connection: Connection) -> Callable[[int, int, float], None]:
    last = 0.0

    def report(steps: int, num_steps: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            with suppress(OSError):  # the parent has died; training must go on to save
                connection.send(("update", (steps, num_steps, loss)))

    return report
