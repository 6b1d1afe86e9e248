"""Suggest commands that go on from a run, as the user types them."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anybatch.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.recipe.build import Setup
    from anybatch.recipe.schema import Recipe

__all__ = ["describe_next_steps", "find_program", "format_command", "list_next_steps"]

IMPORT_NO_CODE = ("examples", "show", "verify")  # commands that import no code of a run


def format_command(name: str, recipe: "Recipe", folder: Path, *options: str) -> str:
    """Format a command on a run as the user types it."""
    from anybatch.recipe.code import has_code

    imports_code = has_code(recipe) and name not in IMPORT_NO_CODE
    allow = ["--allow-code"] if imports_code else []
    return shlex.join(["anybatch", name, str(folder), *options, *allow])


def describe_next_steps(
    setup: "Setup", folder: Path, *, is_interrupted: bool, is_complete: bool
) -> str:
    """Describe what to do after training.

    Args:
        is_interrupted: whether a signal has stopped it.
        is_complete: whether there was no update left to make.
    """
    recipe = setup.recipe
    if is_interrupted:
        return f"Stopped and saved. Continue with: {format_command('resume', recipe, folder)}"
    if is_complete:
        command = format_command("resume", recipe, folder, "--set", "run.epochs=N")
        return f"The run was complete already. To train on: {command}"
    file, has_ledger = folder / "recipe.toml", setup.observe is not None and setup.observe.norms
    steps = {
        "See how one update came about": format_command("explain", recipe, folder),
        "See the examples that drive it": format_command("examples", recipe, folder)
        if has_ledger
        else format_command("train", recipe, file, "--set", "observe.norms=true"),
        "See each prediction": format_command("predict", recipe, folder),
    }
    if sizes := _choose_batch_sizes(setup):
        text = ",".join(map(str, sizes))
        steps["Compare batch sizes"] = format_command("compare", recipe, file, "--batch-size", text)
    program = find_program()
    lines = [f"{title}:\n  {program}{c.removeprefix('anybatch')}" for title, c in steps.items()]
    return "\n".join(["", *lines])


def list_next_steps(overview: Mapping[str, Any]) -> list[str]:
    """List what to do with a run, from its overview: commands, if there are any."""
    program, folder = find_program(), shlex.quote(overview["run"])
    if overview["state"] == "running":
        return [f"{program} show {folder}"]
    if overview["state"] == "made by a script":
        return [f"{program} verify {folder}", "Run the script again to continue it."]
    allow = " --allow-code" if overview["names_code"] else ""
    if overview["state"] == "unfinished":
        return [f"{program} resume {folder}{allow}"]
    steps = [f"{program} {name} {folder}{allow}" for name in ("explain", "predict", "evaluate")]
    ledger = [f"{program} examples {folder}"] if overview["has_ledger"] else []
    spike = [f"{program} explain {folder}{allow} --spike"] if "spikes" in overview else []
    return [*steps, *spike, *ledger, f"{program} resume {folder}{allow} --set run.epochs=N"]


def _choose_batch_sizes(setup: "Setup") -> list[int]:
    """Choose the recipe's own batch size and one that it can be rescaled to; [] if none."""
    from anybatch.recipe.scaling import rescale

    size, num_train = setup.recipe.batch.size, len(setup.splits.train)
    for other in (size * 2, size // 2):
        with suppress(AnybatchError):
            if 1 <= other <= num_train:
                rescale(setup.recipe, batch_size=other, rule="auto", model=setup.model)
                return sorted([size, other])
    return []


def find_program() -> str:
    """Return `anybatch` if a shell finds this installation by that name, else a path to it.

    In a virtual environment that is not activated it is a path such as `.venv/bin/anybatch`.
    """
    script = Path(sys.executable).with_name("anybatch")
    if not script.exists():  # run from a source tree
        return f"{_shorten_path(Path(sys.executable))} -m anybatch"
    on_path = shutil.which("anybatch")
    is_on_path = on_path is not None and Path(on_path).parent.samefile(script.parent)
    return "anybatch" if is_on_path else _shorten_path(script)


def _shorten_path(path: Path) -> str:
    """Write a path relative to the current folder, if it is below it."""
    here = Path(os.path.abspath("."))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
