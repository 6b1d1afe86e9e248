"""The commands: each parses, calls one function, and renders.

Nothing heavy is imported before a command runs, so `anybatch --help` answers at once.
A user's mistake ends in one message and exit code 2, never in a traceback.
"""

import typer

from anybatch.cli import (
    advise,
    compare,
    demo,
    evaluate,
    examples,
    export,
    predict,
    resume,
    scale,
    train,
    verify,
)
from anybatch.cli import explain as explain_page
from anybatch.cli.mistakes import guarded

__all__ = ["app"]

app = typer.Typer(
    help="One exact weight update from any batch.",
    epilog=(
        "Exit codes: 0 done; 2 a mistake of the user's, or damage found, with one message on "
        "stderr; 130 stopped by Ctrl-C and 143 by termination, after the update at hand was "
        "saved; 1 anything else."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo,
    train,
    resume,
    evaluate,
    predict,
    examples,
    explain_page,
    export,
    scale,
    compare,
    advise,
    verify,
)
for command in COMMANDS:
    app.command(name=command.__name__.rpartition(".")[2])(guarded(command.run))
