"""anybatch verify RUN"""

import sys

from anybatch.cli.options import Json, RunFolder

__all__ = ["run"]


def run(folder: RunFolder, as_json: Json = False) -> None:
    """Read every byte of a run's checkpoints, and print the digest of the newest."""
    from anybatch.cli.render import show
    from anybatch.recipe.runs import verify

    found = verify(folder)
    show(found, as_json=as_json)
    if not found["ok"]:
        sys.exit(2)
