"""Arguments that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AcceptData",
    "AllowCode",
    "Json",
    "Part",
    "Patience",
    "Ranks",
    "RunFolder",
    "Set",
    "Split",
]


class Part(StrEnum):
    """A part of the data."""

    train = "train"
    validation = "validation"
    held_out = "held_out"


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Import the code that a run's recipe names.")
]
AcceptData = Annotated[
    bool,
    typer.Option("--accept-data", help="Go on though the data are not those of the run."),
]
Split = Annotated[Part, typer.Option("--split", help="Which part of the data.")]

Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Processes of this machine that share each batch."),
]

Patience = Annotated[
    float,
    typer.Option(
        "--patience", min=1, help="Seconds that ranks wait for one that hangs, then stop."
    ),
]
