"""anybatch export RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.consent import ask_about_code
from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder

__all__ = ["run"]


def run(
    folder: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The file; default: RUN/model.safetensors."),
    ] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """Write a run's weights and buffers as a safetensors file."""
    from anybatch.cli.render import print_result
    from anybatch.recipe.results import describe_origin, export_weights, restore_run

    ask_about_code(folder, allow_code=allow_code, as_json=as_json)
    setup, checkpoint = restore_run(folder, allow_code=allow_code, accept_data=accept_data)
    file = out or folder / "model.safetensors"
    tensors = export_weights(setup, file)
    origin = describe_origin(folder, setup, checkpoint)
    print_result({**origin, "file": str(file), "tensors": tensors}, as_json=as_json)
