"""anybatch explain RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AllowCode, Json, RunFolder

__all__ = ["run"]


def run(
    folder: RunFolder,
    step: Annotated[
        int | None,
        typer.Option(
            "--step",
            metavar="N",
            min=0,
            help="Number of the update; default: the next after the newest checkpoint.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="IDS", help="Explain these examples, such as 3,17,200."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page; default: RUN/explain-step-N.html."),
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Write a page that explains one update of a run.

    The page shows which examples and which layers made the update, and how noisy it is. It is one
    HTML file that needs no network. The update is computed again; the run does not change.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import check_new, write_new
    from anybatch.report.runs import explain_run, ids_of

    if out is not None:
        check_new(out)
    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    ids = None if batch is None else ids_of(batch)
    page, at = explain_run(folder, step=step, ids=ids, allow_code=allow_code)
    name = f"explain-step-{at}.html" if ids is None else f"explain-step-{at}-chosen.html"
    file, content = out or folder / name, page.html.encode()
    write_new(file, content)
    found = {"run": str(folder), "step": at, "examples": page.sections["about"]["examples"]}
    show({**found, "file": str(file), "bytes": len(content)}, as_json=as_json)
