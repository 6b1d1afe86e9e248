"""anybatch verify RUN"""

import sys

import typer

from anybatch.cli.options import Json, RunFolder

__all__ = ["run"]


def run(folder: RunFolder, as_json: Json = False) -> None:
    """Check a run's checkpoints byte by byte, and print the digest.

    Two runs with the same digest hold the same weights and state, bit for bit. Damage ends with
    exit code 2.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import verify

    found = verify(folder)
    show(found, as_json=as_json)
    if not found["ok"]:
        print(f"anybatch: {found['error']}", file=sys.stderr)
        raise typer.Exit(2)
