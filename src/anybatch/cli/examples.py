"""anybatch examples RUN"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder

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
    similar: Annotated[
        int | None,
        typer.Option(
            "--similar", metavar="ID", help="List examples whose gradients align with this one's."
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            "--similar-held-out", metavar="ID", help="The same for an example that was held out."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FILE", help="Write the projections as a .npz file."),
    ] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """List the examples that drive a run.

    Reads the ledger of the run. A run keeps one if its recipe asks for it in the section
    [observe], for instance by --set observe.norms=true. --similar and --export need projections of
    the gradients: --set observe.projections=512. --similar-held-out needs no ledger. It computes
    the gradients anew, at the newest checkpoint.
    """
    if sum(option is not None for option in (similar, held_out, export)) > 1:
        raise typer.BadParameter("choose one of --similar, --similar-held-out and --export.")
    if held_out is not None:
        _print_ends(
            _rank_for_held_out(folder, held_out, top, allow_code, accept_data, as_json), as_json
        )
        return

    from anybatch.cli.render import print_result, print_table
    from anybatch.recipe.results import check_ids, check_new_file, write_new_file
    from anybatch.runs.ledger_files import rank_examples, read_ledger
    from anybatch.runs.similar import export_projections, rank_similar

    if export is not None:
        check_new_file(export, "--export")
    check_ids(folder, accept_data=accept_data)
    if similar is not None:
        result = {"run": str(folder), "example": similar}
        _print_ends(result | rank_similar(folder, similar, top), as_json)
    elif export is not None:
        content, num_rows = export_projections(folder)
        write_new_file(export, content)
        result = {"run": str(folder), "file": str(export), "rows": num_rows}
        print_result(result, as_json=as_json)
    else:
        rows = rank_examples(read_ledger(folder), by.value, top)
        if as_json:
            print_result({"run": str(folder), "by": by.value, "examples": rows}, as_json=True)
        else:
            print_table(rows)


def _rank_for_held_out(
    folder: Path, example: int, top: int, allow_code: bool, accept_data: bool, as_json: bool
) -> dict[str, Any]:
    from anybatch.cli.consent import ask_about_code
    from anybatch.recipe.results import describe_origin, restore_run
    from anybatch.recipe.similar import rank_for_held_out

    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
    origin = describe_origin(folder, setup, checkpoint)
    return origin | rank_for_held_out(setup, example, top)


def _print_ends(result: dict[str, Any], as_json: bool) -> None:
    """Print the examples that are aligned with one, and those that are opposed."""
    from anybatch.cli.render import console, print_result, print_table

    if as_json:
        print_result(result, as_json=True)
        return
    meanings = {"aligned": "lowers", "opposed": "raises"}
    ends = {name: result.pop(name) for name in meanings}
    print_result(result, as_json=False)
    for name, verb in meanings.items():
        rows = ends[name]
        console.print(f"\n{name}: a step on these {verb} the loss of example {result['example']}")
        print_table(rows) if rows else console.print("none")
