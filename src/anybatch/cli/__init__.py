"""Command line of anybatch. See `app` for the commands."""

from collections.abc import Sequence

from anybatch.cli.signals import exit_at_signals

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and raise SystemExit.

    Args:
        argv: the arguments; None: those of the process. A signal then ends the process with its
            exit code at any moment, even during imports.
    """
    if argv is None:
        exit_at_signals()
    from anybatch.cli.app import app

    app(argv, prog_name="anybatch")
