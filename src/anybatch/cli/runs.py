"""anybatch runs [FOLDER]"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from anybatch.cli.options import Json

__all__ = ["count_epochs", "run"]

PARTS = {"training": "", "validation": "validation: ", "held_out": "held out: "}


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where to look; default: runs.")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder: how far each is, and how good.

    The newest is last. Losses are means over the last epoch, without penalties.
    """
    from anybatch.cli.output import wrap_text
    from anybatch.cli.render import console, print_result
    from anybatch.errors import AnybatchError
    from anybatch.recipe.overview import describe_run, find_runs

    found = []
    for path in find_runs(folder):
        try:
            found.append(describe_run(path))
        except AnybatchError as error:
            found.append({"run": str(path), "state": "damaged", "error": str(error)})
    if as_json:
        print_result({"folder": str(folder), "runs": found}, as_json=True)
        return
    for one in found:
        console.print(one["run"])
        console.print(wrap_text(f"  {_describe_run(one)}", console.file))
    if found:
        console.print(f"Look at one: anybatch show {found[-1]['run']}")
    else:
        console.print(f"There are no runs in {folder} yet. Make one: anybatch train lenet-digits")


def _describe_run(found: Mapping[str, Any]) -> str:
    """Say in a line how far a run is and how good."""
    from anybatch.cli.render import format_number

    if "error" in found:
        return f"damaged: {found['error']}"
    text = f"{found['state']}, {count_epochs(found)}"
    for part in PARTS:
        figures = {k: v for k, v in found.get(part, {}).items() if k not in ("epoch", "penalty")}
        if figures:
            values = "  ".join(f"{name} {format_number(value)}" for name, value in figures.items())
            text += f"; {PARTS[part]}{values}"
    return text


def count_epochs(found: Mapping[str, Any]) -> str:
    """Say how many epochs a run has begun, and of how many."""
    of = f" of {found['epochs']}" if "epochs" in found else ""
    return f"epoch {found['epoch']}{of}" if found["step"] else "no update yet"
