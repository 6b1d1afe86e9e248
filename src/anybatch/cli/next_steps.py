"""Commands that go on from a run, each as one types it."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from anybatch.errors import AnybatchError
from anybatch.recipe.build import Setup
from anybatch.recipe.code import has_code
from anybatch.recipe.scaling import rescale
from anybatch.recipe.schema import Recipe

__all__ = ["describe_next_steps", "find_program", "format_command"]


READS_ALONE = ("examples", "show", "verify")  # they import none of a run's code


def format_command(name: str, recipe: Recipe, folder: Path, *options: str) -> str:
    """Write a command for a run as one types it."""
    imports_code = has_code(recipe) and name not in READS_ALONE
    allow = ["--allow-code"] if imports_code else []
    return shlex.join(["anybatch", name, str(folder), *options, *allow])


def describe_next_steps(setup: Setup, folder: Path, *, interrupted: bool, is_new: bool) -> str:
    """Say what to do after a session of training.

    Args:
        setup: what was trained.
        folder: the run.
        interrupted: whether a signal has stopped it.
        is_new: whether the session has made any update.
    """
    recipe = setup.recipe
    if interrupted:
        return f"Stopped and saved. Continue with: {format_command('resume', recipe, folder)}"
    if not is_new:
        command = format_command("resume", recipe, folder, "--set", "run.epochs=N")
        return f"The run was complete already. To train on: {command}"
    steps = {
        "See how one update came about": format_command("explain", recipe, folder),
        "See the examples that drive it": _format_examples_command(setup, folder),
        "See each prediction": format_command("predict", recipe, folder),
    }
    if sizes := _choose_batch_sizes(setup):
        file = folder / "recipe.toml"
        steps["Compare batch sizes"] = format_command(
            "compare", recipe, file, "--batch-size", ",".join(map(str, sizes))
        )
    lines = [f"{title}:\n  {_use_program(command)}" for title, command in steps.items()]
    return "\n".join(["", *lines])


def _use_program(command: str) -> str:
    """Put a path to the program in place of its name where a shell does not find it."""
    return find_program() + command.removeprefix("anybatch")


def _format_examples_command(setup: Setup, folder: Path) -> str:
    """Write the command that lists examples, or trains so that there is a ledger to list."""
    if setup.observe is not None and setup.observe.norms:
        return format_command("examples", setup.recipe, folder)
    file = folder / "recipe.toml"
    return format_command("train", setup.recipe, file, "--set", "observe.norms=true")


def _choose_batch_sizes(setup: Setup) -> list[int]:
    """Choose the recipe's own batch size and another that it can be carried to, if there is one."""
    size, num_train = setup.recipe.batch.size, len(setup.splits.train)
    for other in (size * 2, size // 2):
        with suppress(AnybatchError):
            if 1 <= other <= num_train:
                rescale(setup.recipe, batch_size=other, rule="auto", model=setup.model)
                return sorted([size, other])
    return []


def find_program() -> str:
    """Return `anybatch` where a shell finds this installation by that name, else a path to it.

    In a virtual environment that is not activated it is a path such as `.venv/bin/anybatch`.
    """
    script = Path(sys.executable).with_name("anybatch")
    if not script.exists():  # run from a source tree
        return f"{_shorten_path(Path(sys.executable))} -m anybatch"
    on_path = shutil.which("anybatch")
    is_found = on_path is not None and Path(on_path).parent.samefile(script.parent)
    return "anybatch" if is_found else _shorten_path(script)


def _shorten_path(path: Path) -> str:
    """Write a path from the current folder where it lies below it."""
    here = Path(os.path.abspath("."))
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
