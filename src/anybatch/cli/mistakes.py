"""How a command ends that could not do what it was asked to.

| what happened | on stderr | exit code |
|---|---|---|
| a mistake that the user can mend | one message, no traceback | 2 |
| Ctrl-C or termination | how to continue | 130, 143 |
| nobody reads the output any more | nothing | 1 |
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

from anybatch.cli.output import tell
from anybatch.cli.signals import exit_code_of, raise_at_signals
from anybatch.cli.wrapping import wrap
from anybatch.errors import AnybatchError, RecipeError
from anybatch.limits import escape_controls
from anybatch.paths import check_local

__all__ = ["explain", "guarded"]

POSITIONAL = {
    "folder": "RUN",
    "recipe": "RECIPE",
    "recipes": "RECIPE",
    "source": "RECIPE|RUN",
}


def guarded(command: Callable[..., None], *, needs_torch: bool = True) -> Callable[..., None]:
    """Wrap a command, so that it ends with the exit codes above; its signature stays.

    Args:
        needs_torch: whether it loads PyTorch, which takes seconds and is told on a terminal.
    """

    @wraps(command)
    def run(**arguments: Any) -> None:
        try:
            with raise_at_signals() as signals:
                if needs_torch and "torch" not in sys.modules and sys.stderr.isatty():
                    print("Starting PyTorch ...", file=sys.stderr, flush=True)
                _run(command, arguments, signals)
        except KeyboardInterrupt as stop:  # a second one, or one between the lines here
            raise typer.Exit(exit_code_of(stop)) from None

    return run


def _refuse_urls(arguments: Mapping[str, Any]) -> None:
    """See that no argument of a command is a URL, before anything is made of it."""
    for name, value in arguments.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            check_local(one, POSITIONAL.get(name, f"--{name.replace('_', '-')}"), RecipeError)


def _run(command: Callable[..., None], arguments: dict[str, Any], signals: Any) -> None:
    try:
        with _warnings_shown():
            _refuse_urls(arguments)
            command(**arguments)
        sys.stdout.flush()
    except typer.Exit:
        raise
    except BrokenPipeError:
        _forget_output()
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        tell(str(stop) or "stopped; nothing was written.")
        raise typer.Exit(exit_code_of(stop)) from None
    except Exception as error:
        if signals.stop is not None:  # an import that it has cut off fails otherwise
            raise typer.Exit(exit_code_of(signals.stop)) from None
        message = explain(error)
        if message is None:
            raise
        if arguments.get("as_json"):
            with suppress(OSError):
                print(json.dumps({"ok": False, "error": message}), flush=True)
        _forget_output()
        tell(message)
        raise typer.Exit(2) from None


def explain(error: BaseException) -> str | None:
    """Say what went wrong, for the user; None if it must be a defect of the library."""
    from anybatch.recipe.names import place_in_user_code

    # The rank that failed is named by the message itself.
    notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("raised on ")]
    if isinstance(error, AnybatchError):
        place = None if error.__cause__ is None else place_in_user_code(error.__cause__)
        lines = [] if place is None else [f"in your own code at {place}"]
        return "\n  ".join([str(error), *lines, *notes])
    from anybatch.training.workers import IN_WORKER

    what = f"{type(error).__name__}: {error}"
    place = place_in_user_code(error)
    if place is not None:
        return "\n  ".join([what, f"in your own code at {place}", *notes])
    if any(note.startswith(IN_WORKER) for note in notes):
        return "\n  ".join([what, *notes])
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return (
            f"{where}{error.strerror or error}. "
            f"Expected a place that can be read and written: check path, permissions and disk."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{what}. The memory does not suffice: set batch.micro_batch lower, or to 'auto'."
    if _is_in_model_or_loss(error):
        return f"the model or its loss failed on a batch: {what}. Do the recipe's parts fit?"
    return None


def _is_in_model_or_loss(error: BaseException) -> bool:
    """Whether an objective had called example losses, and torch refused what these asked for."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    if not {"anybatch.objective", "anybatch.gradient.passes"} & set(names):
        return False
    return names[-1].partition(".")[0] != "anybatch" or names[-1].startswith("anybatch.zoo")


class _Formatter(logging.Formatter):
    """Log lines that cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return wrap(escape_controls(super().format(record)), sys.stderr)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print warnings of the library to stderr, such as that of a checkpoint passed over."""
    handler, log = logging.StreamHandler(sys.stderr), logging.getLogger("anybatch")
    handler.setFormatter(_Formatter("anybatch: %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _forget_output() -> None:
    """Drop output that cannot be written, so that it is no second mistake at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
