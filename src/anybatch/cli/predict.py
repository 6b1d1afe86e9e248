"""anybatch predict RUN"""

import json
from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AllowCode, Json, Part, RunFolder

__all__ = ["run"]


def run(
    folder: RunFolder,
    split: Part = "held_out",
    out: Annotated[Path | None, typer.Option("--out", help="File; default: printed.")] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Outputs of a run's model for each example, as JSON lines."""
    from anybatch.cli.render import show
    from anybatch.recipe.runs import predictions, restored, write_new

    built, checkpoint = restored(folder, allow_code=allow_code)
    lines = [json.dumps(row) for row in predictions(built, split)]
    if out is None:
        print("\n".join(lines))
        return
    write_new(out, "".join(f"{line}\n" for line in lines).encode())
    show(
        {
            "run": str(folder),
            "step": checkpoint.step,
            "split": split,
            "file": str(out),
            "examples": len(lines),
        },
        as_json=as_json,
    )
