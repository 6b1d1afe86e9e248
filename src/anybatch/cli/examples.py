"""anybatch examples RUN"""

from enum import StrEnum
from typing import Annotated

import typer

from anybatch.cli.options import AcceptData, Json, RunFolder

__all__ = ["run"]


class By(StrEnum):
    """Figure to rank examples by."""

    norm = "norm"
    loss = "loss"
    share = "share"
    forgetting = "forgetting"


def run(
    folder: RunFolder,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="List N examples.")] = 20,
    by: Annotated[
        By,
        typer.Option(
            "--by", metavar="FIGURE", help="norm, loss or share, in the mean; or forgetting."
        ),
    ] = By.norm,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """List the examples that drive a run.

    Reads the ledger of the run. A run keeps one if its recipe asks for it in the section
    [observe], for instance by --set observe.norms=true.
    """
    from anybatch.cli.render import print_result, print_table
    from anybatch.recipe.results import check_ids
    from anybatch.runs.ledger_files import rank_examples, read_ledger

    check_ids(folder, accept_data=accept_data)
    rows = rank_examples(read_ledger(folder), by.value, top)
    if as_json:
        print_result({"run": str(folder), "by": by.value, "examples": rows}, as_json=True)
    else:
        print_table(rows)
