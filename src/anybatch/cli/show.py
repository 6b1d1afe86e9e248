"""anybatch show RUN"""

import shlex
from collections.abc import Mapping
from typing import Any

from anybatch.cli.next_steps import find_program
from anybatch.cli.options import Json, RunFolder
from anybatch.cli.runs import count_epochs

__all__ = ["run"]


def run(folder: RunFolder, as_json: Json = False) -> None:
    """Show how far a run is, how good, and what to do next.

    Reads the records of the run. No model is built and no code of the run is imported.
    """
    from anybatch.cli.render import console, print_result
    from anybatch.recipe.overview import describe_run

    found = describe_run(folder)
    steps = _next_steps(found)
    if as_json:
        print_result({**found, "next": steps}, as_json=True)
        return
    hidden = ("epochs", "names_code", "has_ledger")
    lines = {name: value for name, value in found.items() if name not in hidden}
    print_result({**lines, "epoch": count_epochs(found).removeprefix("epoch ")}, as_json=False)
    console.print("\nNext:")
    for step in steps:
        console.print(f"  {step}")


def _next_steps(found: Mapping[str, Any]) -> list[str]:
    """Choose what to do with a run, as commands where there are any."""
    program, folder = find_program(), shlex.quote(found["run"])
    if found["state"] == "running":
        return [f"{program} show {folder}"]
    if found["state"] == "made by a script":
        return [f"{program} verify {folder}", "Run the script again to continue it."]
    allow = " --allow-code" if found["names_code"] else ""
    if found["state"] == "unfinished":
        return [f"{program} resume {folder}{allow}"]
    steps = [f"{program} {name} {folder}{allow}" for name in ("explain", "predict", "evaluate")]
    ledger = [f"{program} examples {folder}"] if found["has_ledger"] else []
    return [*steps, *ledger, f"{program} resume {folder}{allow} --set run.epochs=N"]
