"""anybatch verify RUN"""

import sys

import typer

from anybatch.cli.options import AcceptData, Json, RunFolder

__all__ = ["run"]


def run(folder: RunFolder, accept_data: AcceptData = False, as_json: Json = False) -> None:
    """Check every file of a run, and print the digest of its weights.

    A file that was changed, exchanged, removed or added is named, and ends with exit code 2, and so
    do data that are not those of the run any more. Two runs with the same digest hold the same
    weights and state, bit for bit.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import verify

    found = verify(folder, accept_data=accept_data)
    show(found, as_json=as_json)
    if not found["ok"]:
        print(f"anybatch: {found['error']}", file=sys.stderr)
        raise typer.Exit(2)
