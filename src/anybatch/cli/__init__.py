"""The command line. The commands are imported once signals are taken care of; see `app`."""

from collections.abc import Sequence

from anybatch.cli.signals import exit_at_signals

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; ends in SystemExit.

    Args:
        argv: the arguments; None: those of the process, which then ends at a signal with its exit
            code, at any moment.
    """
    if argv is None:
        exit_at_signals()
    from anybatch.cli.app import app

    app(argv, prog_name="anybatch")
