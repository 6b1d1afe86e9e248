"""The usage line and the list of arguments in the help of a command: `RUN`, not `{RUN} <path>`."""

from typing import Any

from typer.core import TyperCommand

from anybatch.limits import escape_controls

__all__ = ["Command"]


class Command(TyperCommand):
    """A command whose arguments are shown by name alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed; a shell may have put names of a stranger's files there."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if isinstance(getattr(error, "message", None), str):  # an error of usage
                error.message = escape_controls(error.message)  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """List the words of the usage line."""
        return ["[OPTIONS]", *(str(one.metavar) for one in _arguments(self))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        arguments = [(str(one.metavar), one.help or "") for one in _arguments(self)]
        records = [one.get_help_record(ctx) for one in self.get_params(ctx)]
        options = [record for record in records if record and record[0].startswith("-")]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _arguments(command: TyperCommand) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "argument"]
