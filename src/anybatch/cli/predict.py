"""anybatch predict RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AcceptData, AllowCode, Json, Part, RunFolder, Split

__all__ = ["run"]


def run(
    folder: RunFolder,
    split: Split = Part.held_out,
    out: Annotated[Path | None, typer.Option("--out", help="File; default: printed.")] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Outputs of a run's model, a line of JSON for each example.

    Printed with --json they are one object instead, with the lines as its "predictions".
    """
    from anybatch.cli.output import say
    from anybatch.cli.render import as_line, show
    from anybatch.recipe.results import predictions, restored, weights_of, write_new

    built, checkpoint = restored(folder, allow_code=allow_code, accept_data=accept_data)
    rows = list(predictions(built, split.value))
    origin = {"run": str(folder), "step": checkpoint.step, "weights": weights_of(built)}
    found = {**origin, "split": split.value}
    if out is not None:
        write_new(out, "".join(f"{as_line(row)}\n" for row in rows).encode())
        show({**found, "file": str(out), "examples": len(rows)}, as_json=as_json)
    elif as_json:
        show({**found, "predictions": rows}, as_json=True)
    else:
        for row in rows:
            say(as_line(row))
