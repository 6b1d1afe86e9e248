"""A command on several ranks: here by `--ranks`, or wherever torchrun has started this process.

Each mistake is told once, by the process that was called, or under torchrun by the rank on which
it was made.
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

from anybatch.cli.mistakes import explain, guarded
from anybatch.cli.signals import exit_code_of, stop_of
from anybatch.errors import AnybatchError
from anybatch.limits import escape_controls, max_processes

if TYPE_CHECKING:
    from anybatch.distributed import ProcessGroup

__all__ = ["on_ranks", "take_own_device", "under_torchrun"]

_MOST_SECONDS = 1e7

Work = Callable[["ProcessGroup | None"], None]


def on_ranks(work: Work, num_ranks: int | None, patience: float) -> None:
    """Call `work(group)` on each rank; group is None where there is one.

    Args:
        patience: seconds that a rank waits for another.

    Raises:
        AnybatchError: what a rank has raised, and which; RankError: a rank that is gone.
    """
    _check_patience(patience)
    if under_torchrun():
        if num_ranks is not None:
            raise AnybatchError(
                "--ranks under torchrun, expected one of them: torchrun --nproc_per_node says how "
                "many processes there are."
            )
        _as_one_of_many(work, timedelta(seconds=patience))
    elif num_ranks is None or num_ranks == 1:
        work(None)
    else:
        from anybatch.training.launch import launch

        if num_ranks > max_processes():
            raise AnybatchError(
                f"--ranks {num_ranks}. Expected at most {max_processes()} on this machine: each "
                f"is a process."
            )
        ranks = partial(launch, imports=["anybatch.cli.session"])
        _end(ranks(partial(_reported, work), num_ranks, patience=timedelta(seconds=patience)))


def under_torchrun() -> bool:
    """Whether this process is one of those that torchrun, or another launcher, has started."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def take_own_device(device: str, group: "ProcessGroup | None") -> None:
    """Of several accelerators each rank of a machine has one of its own."""
    if group is not None and device == "cuda" and "LOCAL_RANK" in os.environ:
        from torch import cuda

        if cuda.is_available():
            cuda.set_device(_number_in("LOCAL_RANK", 0, 2**20) % cuda.device_count())


class _Report(NamedTuple):
    """How a command has ended on a rank."""

    code: int = 0
    message: str | None = None  # None: it has said all
    trace: str | None = None
    is_cause: bool = False  # rather than what another rank's error has come to
    is_agreed: bool = True  # else the others may not know of it


def _reported(work: Work, group: "ProcessGroup") -> _Report:
    found = _Report()

    def command() -> None:
        nonlocal found
        try:
            work(group)
        except (BrokenPipeError, typer.Exit):
            raise
        except KeyboardInterrupt as stop:
            found = _Report(exit_code_of(stop), str(stop) or "stopped; nothing was written.")
        except Exception as error:
            found = _report(error, group)

    _warn_on_the_first_alone(group)
    try:
        guarded(command)()
    except typer.Exit as end:
        found = _Report(end.exit_code, is_cause=True)
    except SystemExit:  # rich's, where nobody reads the output any more
        found = _Report(1, is_cause=True)
    return found


def _report(error: Exception, group: "ProcessGroup") -> _Report:
    from anybatch.distributed import RankError, origin_of, rank_of

    origin, message = origin_of(error), _explained(error)
    trace = "".join(format_exception(error)) if message is None else None
    found = _Report(1 if message is None else 2, message, trace)
    if origin is None:
        is_lost = isinstance(error, RankError)  # of another, and told by all
        return found._replace(is_cause=not is_lost, is_agreed=is_lost)
    return found._replace(is_cause=origin.rank == rank_of(group))


def _explained(error: Exception) -> str | None:
    """What to tell the user, with the rank that it is about."""
    from anybatch.distributed import origin_of

    origin, message = origin_of(error), explain(error)
    if message is None or origin is None or origin.is_shared:
        return message
    return f"on rank {origin.rank}: {message}"


def _end(reports: list[_Report]) -> None:
    """End as the ranks have ended: by the cause, where some have only heard of it."""
    report = max(reports, key=lambda one: (one.is_cause, one.code))
    where = ""
    if not report.is_agreed and not all(other.is_cause for other in reports):
        where = f"on rank {reports.index(report)}: "
    if report.trace is not None:
        sys.stderr.write(escape_controls(f"{where}{report.trace}"))
    elif report.message is not None and report.code > 128:
        raise stop_of(report.code - 128, report.message)
    elif report.message is not None:
        raise AnybatchError(where + report.message)
    if report.code:
        raise typer.Exit(report.code)


def _check_patience(seconds: float) -> None:
    if not 1 <= seconds <= _MOST_SECONDS:
        raise AnybatchError(
            f"--patience {seconds:g}. Expected seconds from 1 to {_MOST_SECONDS:g}."
        )


def _number_in(variable: str, least: int, most: int) -> int:
    """The integer that a launcher has put into the environment.

    Raises:
        AnybatchError: it is missing, no integer, or out of range.
    """
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and least <= int(text) <= most):
        raise AnybatchError(
            f"{variable} = {text!r} in the environment. Expected an integer from {least} to "
            f"{most}, as torchrun sets it. Start the ranks by torchrun, or unset RANK."
        )
    return int(text)


def _as_one_of_many(work: Work, patience: timedelta) -> None:
    from anybatch.distributed import RankError, agreed, joined, origin_of

    size = _number_in("WORLD_SIZE", 1, 2**20)
    rank = _number_in("RANK", 0, size - 1)
    _number_in("MASTER_PORT", 1, 2**16 - 1)
    with joined(rank, size, "env://", patience=patience) as group:
        _warn_on_the_first_alone(group)
        try:
            work(group)
        except Exception as error:
            origin = origin_of(error)
            if origin is not None and origin.rank != rank:
                with suppress(RankError):  # wait until that rank has told, and is gone
                    agreed(lambda: None, group)
                raise typer.Exit(2) from None
            message = _explained(error)
            if message is None:
                raise
            raise AnybatchError(message) from error


def _warn_on_the_first_alone(group: Any) -> None:
    from anybatch.distributed import rank_of

    if rank_of(group) > 0:
        logging.getLogger("anybatch").setLevel(logging.ERROR)
