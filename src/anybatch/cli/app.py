"""Application with all commands.

Nothing heavy is imported before a command runs, so `anybatch --help` answers at once. A mistake of
the user ends with one message and exit code 2, never with a traceback.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
    profile,
    recipes,
    resume,
    runs,
    scale,
    show,
    train,
    verify,
)
from anybatch.cli import explain as explain_page
from anybatch.cli.mistakes import guard_command
from anybatch.limits import escape_controls

__all__ = ["COMMANDS", "app"]

EXIT_CODES = """\b
Exit codes:
  0    The command did what was asked.
  2    The command was refused or found damage. One message says why.
  130  Ctrl-C stopped the command. Training saves the update at hand first.
  143  A termination signal stopped the command, in the same way.
  1    Anything else, such as a defect of anybatch.
"""


class Command(TyperCommand):
    """Command whose arguments are shown by name alone: `RUN`, not `{RUN} <path>`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed; a shell may have put the names of files there."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if isinstance(getattr(error, "message", None), str):  # an error of usage
                error.message = escape_controls(error.message)  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """List the words of the usage line."""
        return ["[OPTIONS]", *(str(one.metavar) for one in _list_arguments(self))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        arguments = [(str(one.metavar), one.help or "") for one in _list_arguments(self)]
        records = [one.get_help_record(ctx) for one in self.get_params(ctx)]
        options = [record for record in records if record and record[0].startswith("-")]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _list_arguments(command: TyperCommand) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "argument"]


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
    profile,
    export,
    verify,
)
NEED_NO_TORCH = (recipes,)
for command in COMMANDS:
    name = command.__name__.rpartition(".")[2]
    function = guard_command(command.run, needs_torch=command not in NEED_NO_TORCH)
    app.command(name=name, cls=Command, epilog=EXIT_CODES)(function)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"anybatch {anybatch.__version__}")
        raise typer.Exit


@app.callback()
def _define_options(
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
