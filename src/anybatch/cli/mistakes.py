"""End a command that could not do what it was asked to.

| what happened | on stderr | exit code |
|---|---|---|
| a mistake that the user can correct | one message, no traceback | 2 |
| Ctrl-C or termination | how to continue | 130, 143 |
| nobody reads the output anymore | nothing | 1 |
| a defect of the library | the traceback | 1 |
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from traceback import walk_tb
from typing import Any

import typer

from anybatch.cli.output import print_error, wrap_text
from anybatch.cli.signals import get_exit_code, raise_at_signals
from anybatch.errors import AnybatchError, RecipeError
from anybatch.limits import escape_controls
from anybatch.paths import check_local

__all__ = ["describe_error", "guard_command"]

POSITIONAL = {
    "folder": "RUN",
    "recipe": "RECIPE",
    "recipes": "RECIPE",
    "source": "RECIPE|RUN",
}


def guard_command(command: Callable[..., None], *, needs_torch: bool = True) -> Callable[..., None]:
    """Wrap a command so that it ends with the exit codes above. Its signature stays.

    Args:
        needs_torch: whether it loads PyTorch. That takes seconds, so a terminal shows a message.
    """

    @wraps(command)
    def run(**arguments: Any) -> None:
        try:
            with raise_at_signals() as signals:
                if needs_torch and "torch" not in sys.modules and sys.stderr.isatty():
                    print("Starting PyTorch ...", file=sys.stderr, flush=True)
                _run_command(command, arguments, signals)
        except KeyboardInterrupt as stop:  # a second signal, or one between these lines
            raise typer.Exit(get_exit_code(stop)) from None

    return run


def _refuse_urls(arguments: Mapping[str, Any]) -> None:
    """Refuse URLs in the arguments of a command."""
    for name, value in arguments.items():
        place = POSITIONAL.get(name, f"--{name.replace('_', '-')}")
        for one in value if isinstance(value, list | tuple) else [value]:
            check_local(one, place, RecipeError)


def _run_command(command: Callable[..., None], arguments: dict[str, Any], signals: Any) -> None:
    try:
        with _print_warnings():
            _refuse_urls(arguments)
            command(**arguments)
        sys.stdout.flush()
    except typer.Exit as end:
        if end.exit_code and signals.stop is not None:  # what it found may be the signal's doing
            raise typer.Exit(get_exit_code(signals.stop)) from None
        raise
    except BrokenPipeError:
        _drop_output()
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        print_error(str(stop) or "stopped; nothing was written.")
        raise typer.Exit(get_exit_code(stop)) from None
    except Exception as error:
        if signals.stop is not None:  # the signal may have cut off an import, which then fails
            raise typer.Exit(get_exit_code(signals.stop)) from None
        message = describe_error(error)
        if message is None:
            raise
        if arguments.get("as_json"):
            with suppress(OSError):
                print(json.dumps({"ok": False, "error": message}), flush=True)
        _drop_output()
        print_error(message)
        raise typer.Exit(2) from None


def describe_error(error: BaseException) -> str | None:
    """Describe an error for the user; None if it must be a defect of the library."""
    from anybatch.recipe.names import locate_user_code

    # The message itself names the rank that failed.
    notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("raised on ")]
    if isinstance(error, AnybatchError):
        place = None if error.__cause__ is None else locate_user_code(error.__cause__)
        lines = [] if place is None else [f"in your own code at {place}"]
        return "\n  ".join([str(error), *lines, *notes])
    from anybatch.workers import IN_WORKER

    text = f"{type(error).__name__}: {error}"
    place = locate_user_code(error)
    if place is not None:
        return "\n  ".join([text, f"in your own code at {place}", *notes])
    if any(note.startswith(IN_WORKER) for note in notes):
        return "\n  ".join([text, *notes])
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return (
            f"{where}{error.strerror or error}. The file or folder must be readable and writable. "
            f"Check path, permissions and disk."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{text}. The memory is too small. Set batch.micro_batch lower, or to 'auto'."
    if _is_in_model_or_loss(error):
        return f"the model or its loss failed on a batch: {text}. Do model, loss and data fit?"
    return None


def _is_in_model_or_loss(error: BaseException) -> bool:
    """Return whether torch raised an error inside the model or the loss of an objective."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    if not {"anybatch.objective", "anybatch.gradient.passes"} & set(names):
        return False
    return names[-1].partition(".")[0] != "anybatch" or names[-1].startswith("anybatch.zoo")


class _Formatter(logging.Formatter):
    """Formatter whose lines cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return wrap_text(escape_controls(super().format(record)), sys.stderr)


@contextmanager
def _print_warnings() -> Iterator[None]:
    """Print warnings of the library to stderr."""
    handler, log = logging.StreamHandler(sys.stderr), logging.getLogger("anybatch")
    handler.setFormatter(_Formatter("anybatch: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _drop_output() -> None:
    """Drop output that cannot be written, so that it does not raise again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
