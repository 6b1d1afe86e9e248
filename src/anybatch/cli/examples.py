"""anybatch examples RUN"""

from collections.abc import Mapping
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


Top = Annotated[int, typer.Option("--top", metavar="N", min=1, help="List N examples.")]
ByOption = Annotated[
    By,
    typer.Option("--by", metavar="FIGURE", help="norm, loss or share, in the mean; or forgetting."),
]
Similar = Annotated[
    int | None,
    typer.Option(
        "--similar", metavar="ID", help="List examples whose gradients align with this one's."
    ),
]
SimilarHeldOut = Annotated[
    int | None,
    typer.Option(
        "--similar-held-out", metavar="ID", help="The same for an example that was held out."
    ),
]
Export = Annotated[
    Path | None,
    typer.Option("--export", metavar="FILE", help="Write the projections to a .npz file."),
]


def run(
    folder: RunFolder,
    top: Top = 20,
    by: ByOption = By.norm,
    similar: Similar = None,
    held_out: SimilarHeldOut = None,
    export: Export = None,
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
        from anybatch.cli.consent import ask_about_code
        from anybatch.recipe.results import describe_origin, restore_run
        from anybatch.recipe.similar import rank_for_held_out

        ask_about_code(folder, allow_code=allow_code, as_json=as_json)
        setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
        origin = describe_origin(folder, setup, checkpoint)
        _print_ends(origin | rank_for_held_out(setup, held_out, top), as_json=as_json)
        return
    from anybatch.recipe.results import check_ids

    check_ids(folder, accept_data=accept_data)
    if export is not None:
        _export(folder, export, as_json=as_json)
    elif similar is not None:
        from anybatch.runs.similar import rank_similar

        result = {"run": str(folder), "example": similar}
        _print_ends(result | rank_similar(folder, similar, top), as_json=as_json)
    else:
        _print_ranks(folder, by, top, as_json=as_json)


def _print_ranks(folder: Path, by: By, top: int, *, as_json: bool) -> None:
    """Print the examples with the largest figure."""
    from anybatch.cli.render import print_result, print_table
    from anybatch.runs.ledger_files import rank_examples, read_ledger

    rows = rank_examples(read_ledger(folder), by.value, top)
    if as_json:
        print_result({"run": str(folder), "by": by.value, "examples": rows}, as_json=True)
    else:
        print_table(rows)


def _export(folder: Path, file: Path, *, as_json: bool) -> None:
    """Write the projections of a run to a new file."""
    from anybatch.cli.render import print_result
    from anybatch.recipe.results import check_new_file, write_new_file
    from anybatch.runs.similar import export_projections

    check_new_file(file, "--export")
    content, num_rows = export_projections(folder)
    write_new_file(file, content)
    print_result({"run": str(folder), "file": str(file), "rows": num_rows}, as_json=as_json)


def _print_ends(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the examples that are aligned with one, and those that oppose it."""
    from anybatch.cli.render import console, print_result, print_table

    if as_json:
        print_result(result, as_json=True)
        return
    effects = {"aligned": "lowers", "opposed": "raises"}
    head = {name: value for name, value in result.items() if name not in effects}
    print_result(head, as_json=False)
    for name, effect in effects.items():
        console.print(f"\n{name}: a step on these {effect} the loss of example {head['example']}")
        if result[name]:
            print_table(result[name])
        else:
            console.print("none")
