"""anybatch explain RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder

__all__ = ["run"]

Update = Annotated[
    int | None,
    typer.Option(
        "--step",
        metavar="N",
        min=0,
        help="Number of the update, from 0; default: an early one that shows a lot.",
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(
        "--batch",
        metavar="IDS",
        help="Show these examples, such as 3,17,200, in place of the batch of that update.",
    ),
]


Spike = Annotated[
    bool,
    typer.Option(
        "--spike", help="Show the newest spike, or the one of --step; see [spikes] of a recipe."
    ),
]


def run(
    folder: RunFolder,
    step: Update = None,
    batch: Ids = None,
    spike: Spike = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page; default: RUN/explain-step-N.html."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Write a page that shows how a batch of a run becomes an update.

    The page is one HTML file that opens without a network. The update is computed again; the run
    does not change.
    """
    import webbrowser

    from anybatch.cli.render import print_result
    from anybatch.recipe.results import check_new_file, write_new_file
    from anybatch.report.runs import explain_run, parse_ids
    from anybatch.report.spikes import find_spike

    if out is not None:
        check_new_file(out)
    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    ids = None if batch is None else parse_ids(batch)
    accepts = {"allow_code": allow_code, "accept_data": accept_data}
    reason = None
    if spike:
        step, reason = find_spike(folder, step)
    page, at = explain_run(folder, step=step, ids=ids, reason=reason, **accepts)
    name = f"explain-step-{at}.html" if ids is None else f"explain-step-{at}-chosen.html"
    file, content = out or folder / name, page.html.encode()
    write_new_file(file, content)
    about = page.sections["about"]
    result = {"run": str(folder), "step": at, "examples": about["examples"]}
    if about["reason"] is not None:
        result["reason"] = about["reason"]
    print_result({**result, "file": str(file), "bytes": len(content)}, as_json=as_json)
    if open_page and not webbrowser.open(file.resolve().as_uri()):
        typer.echo(f"No browser could be started here. Open {file} yourself.", err=True)
