"""anybatch verify RUN"""

import typer

from anybatch.cli.options import AcceptData, Json, RunFolder
from anybatch.cli.output import print_error

__all__ = ["run"]


def run(folder: RunFolder, accept_data: AcceptData = False, as_json: Json = False) -> None:
    """Check every file of a run, and print its digest.

    Each file is compared with its checksum. A file that was changed, exchanged, removed or added is
    named, and the exit code is 2; so it is if the data are no longer those of the run. Two runs
    with the same digest hold the same weights and state, bit for bit.
    """
    from anybatch.cli.render import print_result
    from anybatch.recipe.results import verify_run

    report = verify_run(folder, accept_data=accept_data)
    print_result(report, as_json=as_json)
    if not report["ok"]:
        print_error(report["error"])
        raise typer.Exit(2)
