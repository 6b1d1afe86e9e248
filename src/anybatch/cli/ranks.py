"""Run a command on several ranks: here by `--ranks`, or under torchrun.

Each error is printed once: by the parent process, or under torchrun by the rank that raised it.
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from traceback import format_exception
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from anybatch.cli.mistakes import describe_error, guard_command
from anybatch.cli.signals import get_exit_code, make_stop
from anybatch.errors import AnybatchError
from anybatch.limits import escape_controls, max_processes

if TYPE_CHECKING:
    from anybatch.distributed import ProcessGroup

__all__ = ["call_on_ranks", "is_under_torchrun", "select_device"]

_MAX_SECONDS = 1e7

Work = Callable[["ProcessGroup | None"], None]


def call_on_ranks(work: Work, num_ranks: int | None, patience: float) -> None:
    """Call `work(group)` on each rank. The group is None if there is one rank.

    Args:
        num_ranks: number of processes to start; None: those of torchrun, or this one.
        patience: seconds that a rank waits for another.

    Raises:
        AnybatchError: the error of a rank, with its number; RankError: a rank has died.
    """
    if not 1 <= patience <= _MAX_SECONDS:
        raise AnybatchError(
            f"--patience {patience:g}. Expected seconds from 1 to {_MAX_SECONDS:g}."
        )
    if is_under_torchrun():
        if num_ranks is not None:
            raise AnybatchError(
                "--ranks is set under torchrun. Leave it out: torchrun --nproc_per_node sets the "
                "number of processes."
            )
        _call_under_torchrun(work, timedelta(seconds=patience))
    elif num_ranks is None or num_ranks == 1:
        work(None)
    else:
        from anybatch.training.launch import launch

        if num_ranks > max_processes():
            raise AnybatchError(
                f"--ranks {num_ranks}. Expected at most {max_processes()} on this machine: each "
                f"is a process."
            )
        call = partial(_call_on_rank, work)
        modules = ["anybatch.cli.session"]
        _end(launch(call, num_ranks, patience=timedelta(seconds=patience), imports=modules))


def is_under_torchrun() -> bool:
    """Return whether torchrun, or another launcher, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def select_device(device: str, group: "ProcessGroup | None") -> None:
    """Select an accelerator of its own for each rank of a machine."""
    if group is not None and device == "cuda" and "LOCAL_RANK" in os.environ:
        from torch import cuda

        if cuda.is_available():
            cuda.set_device(_read_integer("LOCAL_RANK", 0, 2**20) % cuda.device_count())


class _Report(NamedTuple):
    """Result of a command on a rank."""

    code: int = 0
    message: str | None = None  # None: the rank has printed it
    trace: str | None = None
    is_cause: bool = False  # its own error, not that of another rank
    is_agreed: bool = True  # the other ranks know of the error


def _call_on_rank(work: Work, group: "ProcessGroup") -> _Report:
    """Call `work(group)`, and report how it ended."""
    report = _Report()

    def command() -> None:
        nonlocal report
        try:
            work(group)
        except (BrokenPipeError, typer.Exit):
            raise
        except KeyboardInterrupt as stop:
            report = _Report(get_exit_code(stop), str(stop) or "stopped; nothing was written.")
        except Exception as error:
            report = _make_report(error, group)

    _silence_other_ranks(group)
    try:
        guard_command(command)()
    except typer.Exit as end:
        report = _Report(end.exit_code, is_cause=True)
    except SystemExit:  # rich raises it if nobody reads the output anymore
        report = _Report(1, is_cause=True)
    return report


def _make_report(error: Exception, group: "ProcessGroup") -> _Report:
    from anybatch.distributed import RankError, find_origin, get_rank

    origin, message = find_origin(error), _describe_with_rank(error)
    trace = "".join(format_exception(error)) if message is None else None
    report = _Report(1 if message is None else 2, message, trace)
    if origin is None:
        is_lost = isinstance(error, RankError)  # another rank has died, and all know it
        return report._replace(is_cause=not is_lost, is_agreed=is_lost)
    return report._replace(is_cause=origin.rank == get_rank(group))


def _describe_with_rank(error: Exception) -> str | None:
    """Describe an error for the user, with the rank that it is about."""
    from anybatch.distributed import find_origin

    origin, message = find_origin(error), describe_error(error)
    if message is None or origin is None or origin.is_shared:
        return message
    return f"on rank {origin.rank}: {message}"


def _end(reports: list[_Report]) -> None:
    """End as the ranks have ended: with the error of the rank that caused it."""
    report = max(reports, key=lambda one: (one.is_cause, one.code))
    place = ""
    if not report.is_agreed and not all(other.is_cause for other in reports):
        place = f"on rank {reports.index(report)}: "
    if report.trace is not None:
        sys.stderr.write(escape_controls(f"{place}{report.trace}"))
    elif report.message is not None and report.code > 128:
        raise make_stop(report.code - 128, report.message)
    elif report.message is not None:
        raise AnybatchError(place + report.message)
    if report.code:
        raise typer.Exit(report.code)


def _read_integer(variable: str, least: int, most: int) -> int:
    """Read an integer that a launcher has put into the environment."""
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and least <= int(text) <= most):
        raise AnybatchError(
            f"{variable} = {text!r} in the environment. Expected an integer from {least} to "
            f"{most}, as torchrun sets it. Start the ranks by torchrun, or unset RANK."
        )
    return int(text)


def _call_under_torchrun(work: Work, patience: timedelta) -> None:
    from anybatch.distributed import RankError, call_together, find_origin, init_group

    size = _read_integer("WORLD_SIZE", 1, 2**20)
    rank = _read_integer("RANK", 0, size - 1)
    _read_integer("MASTER_PORT", 1, 2**16 - 1)
    with init_group(rank, size, "env://", timeout=patience) as group:
        _silence_other_ranks(group)
        try:
            work(group)
        except Exception as error:
            origin = find_origin(error)
            if origin is not None and origin.rank != rank:
                with suppress(RankError):  # wait until that rank has printed its error
                    call_together(lambda: None, group)
                raise typer.Exit(2) from None
            message = _describe_with_rank(error)
            if message is None:
                raise
            raise AnybatchError(message) from error


def _silence_other_ranks(group: Any) -> None:
    """Show warnings on the first rank only."""
    from anybatch.distributed import get_rank

    if get_rank(group) > 0:
        logging.getLogger("anybatch").setLevel(logging.ERROR)
