"""Arguments and options that several commands share."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AcceptData",
    "AllowCode",
    "Html",
    "Json",
    "Patience",
    "Ranks",
    "RecipeName",
    "RunFolder",
    "Set",
    "SplitName",
    "SplitOption",
    "check_seeds",
    "complete_recipe",
]


class SplitName(StrEnum):
    """Name of a split of the data."""

    train = "train"
    validation = "validation"
    held_out = "held_out"


def complete_recipe(typed: str) -> Iterator[str]:
    """List shipped recipes and TOML files that begin as typed, for the shell's completion."""
    from anybatch.shipped import recipe_files

    yield from (name for name in recipe_files() if name.startswith(typed))
    yield from (str(file) for file in Path().glob(f"{typed}*.toml"))


def complete_run(typed: str) -> Iterator[str]:
    """List folders of runs that begin as typed, for the shell's completion."""
    for pattern in (f"{typed}*/run.json", f"{typed}*/*/run.json"):
        yield from (str(mark.parent) for mark in Path().glob(pattern))


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run.", autocompletion=complete_run)
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file, or the name of a shipped recipe.",
        autocompletion=complete_recipe,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe. May be given several times."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Import the code that the recipe of a run names.")
]
SplitOption = Annotated[
    SplitName, typer.Option("--split", metavar="PART", help="train, validation or held_out.")
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")
]
AcceptData = Annotated[
    bool,
    typer.Option("--accept-data", help="Continue although the data have changed since the run."),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks", metavar="N", min=1, help="Share each batch among N processes on this machine."
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        "--patience",
        metavar="SECONDS",
        min=1,
        help="Stop when a rank makes the others wait for so long.",
    ),
]


def check_seeds(number: int) -> int:
    """Refuse more runs than anybody means."""
    if number > 1000:
        raise typer.BadParameter(f"{number} seeds are too many. The most are 1000.")
    return number
