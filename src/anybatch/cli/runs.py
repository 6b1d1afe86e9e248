"""anybatch runs [FOLDER]"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.options import Json
from anybatch.displays import format_number

__all__ = ["count_epochs", "run"]

TITLES = {"training": "", "validation": "validation: ", "held_out": "held out: "}


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where to look; default: runs.")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder: how far each is, and how good.

    The newest is last. Losses are means over the last epoch, without penalties.
    """
    from anybatch.cli.render import console, print_result, print_wrapped
    from anybatch.errors import AnybatchError
    from anybatch.recipe.overview import describe_run, find_runs

    overviews = []
    for path in find_runs(folder):
        try:
            overviews.append(describe_run(path))
        except AnybatchError as error:
            overviews.append({"run": str(path), "state": "damaged", "error": str(error)})
    if as_json:
        print_result({"folder": str(folder), "runs": overviews}, as_json=True)
        return
    for overview in overviews:
        console.print(overview["run"])
        print_wrapped(f"  {_describe_run(overview)}")
    if overviews:
        console.print(f"Look at one: anybatch show {overviews[-1]['run']}")
    else:
        console.print(f"There are no runs in {folder} yet. Make one: anybatch train lenet-digits")


def _describe_run(overview: Mapping[str, Any]) -> str:
    """Say in a line how far a run is and how good."""
    if "error" in overview:
        return f"damaged: {overview['error']}"
    text = f"{overview['state']}, {count_epochs(overview)}"
    for name, title in TITLES.items():
        figures = {k: v for k, v in overview.get(name, {}).items() if k not in ("epoch", "penalty")}
        if figures:
            values = "  ".join(
                f"{k.replace('_', ' ')} {format_number(value)}" for k, value in figures.items()
            )
            text += f"; {title}{values}"
    return text


def count_epochs(overview: Mapping[str, Any]) -> str:
    """Say how many epochs a run has begun, and of how many."""
    of = f" of {overview['epochs']}" if "epochs" in overview else ""
    return f"epoch {overview['epoch']}{of}" if overview["step"] else "no update yet"
