"""anybatch explain RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder

__all__ = ["run"]


def run(
    folder: RunFolder,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="Update; default: the next after the last checkpoint."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="IDS", help="Examples, such as 3,17,200.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File; default: RUN/explain-step-N.html.")
    ] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """One update of a run as a page: which examples, which layers, how noisy.

    A single HTML file that needs no network. The update is made again, and nothing of the run
    changes.
    """
    from anybatch.cli.render import show
    from anybatch.recipe.results import check_new, write_new
    from anybatch.report.runs import explain_run, ids_of

    if out is not None:
        check_new(out)
    ids = None if batch is None else ids_of(batch)
    accepts = {"allow_code": allow_code, "accept_data": accept_data}
    page, at = explain_run(folder, step=step, ids=ids, **accepts)
    name = f"explain-step-{at}.html" if ids is None else f"explain-step-{at}-chosen.html"
    file, content = out or folder / name, page.html.encode()
    write_new(file, content)
    found = {"run": str(folder), "step": at, "examples": page.sections["about"]["examples"]}
    show({**found, "file": str(file), "bytes": len(content)}, as_json=as_json)
