"""anybatch verify RUN"""

import typer

from anybatch.cli.options import Json, RunFolder
from anybatch.cli.output import tell

__all__ = ["run"]


def run(folder: RunFolder, as_json: Json = False) -> None:
    """Read every byte of a run's checkpoints, and print the digest of the newest.

    Two runs with the same digest hold the same weights and state, bit for bit. Damage ends
    with exit code 2.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import verify

    found = verify(folder)
    show(found, as_json=as_json)
    if not found["ok"]:
        tell(found["error"])
        raise typer.Exit(2)
