"""The question whether code that a run names may be imported, asked once on a terminal."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anybatch.cli.ranks import under_torchrun
from anybatch.limits import escape_controls

if TYPE_CHECKING:
    from anybatch.recipe.schema import Recipe

__all__ = ["ask_about_code", "ask_about_recipes"]


def ask_about_code(folder: Path, *, allow_code: bool, as_json: bool) -> None:
    """Ask on a terminal whether the code of a run may be imported, and remember a yes.

    Nobody is asked with --allow-code or --json, without a terminal, or where the answer was yes
    before and the files are the same; see `anybatch.recipe.code`. After a no the command is refused
    as without a terminal.
    """
    if not _may_ask(allow_code=allow_code, as_json=as_json):
        return
    from anybatch.recipe.code import places_of_run
    from anybatch.recipe.runs import recipe_of

    _ask(folder, recipe_of(folder), places_of_run(folder))


def ask_about_recipes(names: Sequence[str], *, allow_code: bool, as_json: bool) -> None:
    """Ask about each recipe that is or lies in the folder of a run, or whose code lies elsewhere
    than in the folder that the user is in."""
    if not _may_ask(allow_code=allow_code, as_json=as_json):
        return
    from anybatch.recipe.files import find, read
    from anybatch.recipe.names import names_elsewhere

    for name in names:
        places = (Path(name), *Path(name).resolve().parents)
        run = next((place for place in places if _is_run(place)), None)
        if run is not None:
            ask_about_code(run, allow_code=allow_code, as_json=as_json)
            continue
        path = find(name)
        recipe = read(path, [])
        folder = path.absolute().parent
        if names_elsewhere(recipe, folder):
            _ask(path, recipe, [folder])


def _ask(asker: Path, recipe: "Recipe", places: Sequence[Path]) -> None:
    from anybatch.recipe.code import consent_folder, files_of, is_remembered, remember
    from anybatch.recipe.names import code_names

    if not code_names(recipe) or consent_folder() is None or is_remembered(places, recipe):
        return
    name = escape_controls(shlex.quote(str(asker)))
    print(f"{name} names code, which runs with your rights:", file=sys.stderr)
    for name, files in files_of(places, recipe).items():
        where = ", ".join(map(str, files)) or "not found"
        print(f"  {ascii(name)[1:-1]}  {ascii(where)[1:-1]}", file=sys.stderr)
    print(
        "Import it, now and as long as these files are the same? [y/N] ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        remember(places, recipe)


def _may_ask(*, allow_code: bool, as_json: bool) -> bool:
    return not (allow_code or as_json or under_torchrun()) and _is_terminal()


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "recipe.toml").is_file()


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
