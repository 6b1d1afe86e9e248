"""Ask on a terminal, once, whether the code that a recipe names may be imported."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anybatch.cli.ranks import is_under_torchrun
from anybatch.limits import escape_controls

if TYPE_CHECKING:
    from anybatch.recipe.schema import Recipe

__all__ = ["ask_about_code", "ask_about_recipes"]


def ask_about_code(folder: Path, *, allow_code: bool, as_json: bool) -> None:
    """Ask on a terminal whether the code of a run may be imported, and remember a yes.

    Nobody is asked with --allow-code or --json, without a terminal, or if the answer was yes before
    and the files are the same; see `anybatch.recipe.code`. After a no the command is refused as
    without a terminal.
    """
    if _may_ask(allow_code=allow_code, as_json=as_json):
        from anybatch.recipe.code import list_code_folders
        from anybatch.recipe.runs import read_run_recipe

        _ask(folder, read_run_recipe(folder), list_code_folders(folder))


def ask_about_recipes(names: Sequence[str], *, allow_code: bool, as_json: bool) -> None:
    """Ask about each recipe that is or lies in the folder of a run, or names foreign code."""
    if not _may_ask(allow_code=allow_code, as_json=as_json):
        return
    from anybatch.recipe.code import list_foreign_code
    from anybatch.recipe.files import find_recipe, read_recipe

    for name in names:
        folders = (Path(name), *Path(name).resolve().parents)
        run = next((folder for folder in folders if _is_run(folder)), None)
        if run is not None:
            ask_about_code(run, allow_code=allow_code, as_json=as_json)
            continue
        path = find_recipe(name)
        recipe = read_recipe(path, [])
        folder = path.absolute().parent
        if list_foreign_code(recipe, folder):
            _ask(path, recipe, [folder])


def _ask(source: Path, recipe: "Recipe", folders: Sequence[Path]) -> None:
    from anybatch.recipe.code import (
        find_code_files,
        find_memory_folder,
        is_remembered,
        list_code,
        remember_code,
    )

    if not list_code(recipe) or find_memory_folder() is None or is_remembered(folders, recipe):
        return
    quoted = escape_controls(shlex.quote(str(source)))
    print(f"{quoted} names code, which runs with your rights:", file=sys.stderr)
    for name, files in find_code_files(folders, recipe).items():
        places = ", ".join(map(str, files)) or "not found"
        print(f"  {ascii(name)[1:-1]}  {ascii(places)[1:-1]}", file=sys.stderr)
    question = "Import it, now and as long as these files are the same? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        remember_code(folders, recipe)


def _may_ask(*, allow_code: bool, as_json: bool) -> bool:
    if allow_code or as_json or is_under_torchrun():
        return False
    return sys.stdin.isatty() and sys.stderr.isatty()


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "recipe.toml").is_file()
