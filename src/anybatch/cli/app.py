"""The commands: each parses, calls one function, and renders.

Nothing heavy is imported before a command runs, so `anybatch --help` answers at once.
A user's mistake ends in one message and exit code 2, never in a traceback.
"""

from typing import Annotated

import typer

import anybatch
from anybatch.cli import (
    advise,
    compare,
    demo,
    evaluate,
    examples,
    export,
    new,
    predict,
    recipes,
    resume,
    runs,
    scale,
    show,
    train,
    verify,
)
from anybatch.cli import explain as explain_page
from anybatch.cli.mistakes import guarded
from anybatch.cli.usage import Command

__all__ = ["COMMANDS", "app"]

EXIT_CODES = """\b
Exit codes:
  0    The command did what was asked.
  2    The command was refused or found damage. One message says why.
  130  Ctrl-C stopped the command. Training saves the update at hand first.
  143  A termination signal stopped the command, in the same way.
  1    Anything else, such as a defect of anybatch.
"""

app = typer.Typer(
    epilog=f"{EXIT_CODES}\nEach command explains its options: anybatch COMMAND --help",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would read [observe] as markup and cut long words
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo,
    new,
    recipes,
    train,
    resume,
    runs,
    show,
    evaluate,
    predict,
    explain_page,
    examples,
    compare,
    scale,
    advise,
    export,
    verify,
)
NEED_NO_TORCH = (recipes,)
for command in COMMANDS:
    name = command.__name__.rpartition(".")[2]
    safe = guarded(command.run, needs_torch=command not in NEED_NO_TORCH)
    app.command(name=name, cls=Command, epilog=EXIT_CODES)(safe)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"anybatch {anybatch.__version__}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn a batch of examples into one exact weight update.

    A recipe is a TOML file, or the name of one that comes with anybatch (anybatch recipes). A run
    is the folder that training writes. To begin: anybatch train lenet-digits
    """
