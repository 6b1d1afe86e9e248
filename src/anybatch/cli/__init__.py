"""The command line: each command parses, calls one function, and renders.

Nothing heavy is imported before a command runs, so `anybatch --help` answers at once.
A user's mistake ends in one message and exit code 2, never in a traceback.
"""

import json
import sys

import typer

from anybatch.cli import demo, evaluate, export, predict, resume, train, verify

__all__ = ["app", "main"]

app = typer.Typer(
    help="One exact weight update from any batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, resume, evaluate, predict, export, verify):
    app.command(name=command.__name__.rpartition(".")[2])(command.run)


def main() -> None:
    """Run the command line, and say what a user can mend in one message."""
    try:
        app()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if "--json" in sys.argv:
            print(json.dumps({"ok": False, "error": message}))
        print(f"anybatch: {message}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str | None:
    """What to tell the user; None for a defect of the library."""
    from anybatch.errors import AnybatchError

    if isinstance(error, AnybatchError):
        return str(error)
    return None
