"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AllowCode", "Json", "Part", "RunFolder", "Set"]

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Import the code that a run's recipe names.")
]
Part = Annotated[str, typer.Option("--split", help="Which data: train or held_out.")]
