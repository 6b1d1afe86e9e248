"""End a command at signals with their own exit code, without a traceback, at any moment.

    Ctrl-C (SIGINT)  130        termination (SIGTERM)  143

Within a command a signal raises `KeyboardInterrupt` or `Terminated`, so that files are closed and
a message says how to continue. A second signal ends the process at once. Outside of a command, such
as during imports and at the end, the first signal does.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from anybatch.errors import Terminated

__all__ = ["exit_at_signals", "get_exit_code", "make_stop", "raise_at_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_at_signals() -> None:
    """Let signals end this process at once."""
    for number in _SIGNALS:
        signal.signal(number, _exit)


def make_stop(signum: int, message: str = "") -> KeyboardInterrupt:
    """Make the exception of a signal."""
    return (Terminated if signum == signal.SIGTERM else KeyboardInterrupt)(message)


def get_exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of the signal behind an exception."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


class _Raise:
    """Signal handler that raises, and the exception that it has raised."""

    def __init__(self) -> None:
        self.stop: KeyboardInterrupt | None = None
        self._ends_process = signal.getsignal(signal.SIGTERM) is _exit

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._ends_process and (self.stop is not None or _is_importing(frame)):
            _exit(signum, frame)
        self.stop = make_stop(signum)
        raise self.stop

    def end_if_lost(self, unraisable: Any) -> None:
        """End the process if the exception of a signal cannot be raised, as in a destructor."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            os._exit(get_exit_code(unraisable.exc_value))
        sys.__unraisablehook__(unraisable)


@contextmanager
def raise_at_signals() -> Iterator[_Raise]:
    """Let signals raise within a command."""
    handler = _Raise()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    hook, sys.unraisablehook = sys.unraisablehook, handler.end_if_lost
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        sys.unraisablehook = hook


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported. C code may then drop an exception silently."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _exit(signum: int, frame: FrameType | None) -> None:
    os._exit(128 + signum)
