"""anybatch verify RUN"""

import typer

from anybatch.cli.options import AcceptData, Json, RunFolder
from anybatch.cli.output import tell

__all__ = ["run"]


def run(folder: RunFolder, accept_data: AcceptData = False, as_json: Json = False) -> None:
    """Compare every file of a run with its checksum, and print the digest of the newest checkpoint.

    A file that was changed, exchanged, removed or added is named, and ends with exit code 2, and so
    do data that are not those of the run any more. Two runs with the same digest hold the same
    weights and state, bit for bit.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import verify

    found = verify(folder, accept_data=accept_data)
    show(found, as_json=as_json)
    if not found["ok"]:
        tell(found["error"])
        raise typer.Exit(2)
