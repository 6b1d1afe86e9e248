"""anybatch export RUN"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AcceptData, AllowCode, Json, RunFolder

__all__ = ["run"]


def run(
    folder: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="File; default: RUN/model.safetensors.")
    ] = None,
    allow_code: AllowCode = False,
    accept_data: AcceptData = False,
    as_json: Json = False,
) -> None:
    """A run's weights and buffers as safetensors."""
    from anybatch.cli.render import show
    from anybatch.recipe.results import export, restored, weights_of

    built, checkpoint = restored(folder, allow_code=allow_code, accept_data=accept_data)
    file = out or folder / "model.safetensors"
    tensors = export(built, file)
    origin = {"run": str(folder), "step": checkpoint.step, "weights": weights_of(built)}
    show({**origin, "file": str(file), "tensors": tensors}, as_json=as_json)
