"""anybatch train RECIPE"""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AllowCode, Json, Set

__all__ = ["run"]


def run(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    changes: Set = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the new run.")] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Train from so many seeds; mean and spread.")
    ] = 1,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe.

    Stopped by Ctrl-C it finishes the update, saves it, says how to continue, and ends with
    exit code 130; a second Ctrl-C stops at once.
    """
    from anybatch.cli.session import follow, follow_seeds, fresh_folder
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import begun, read_recipe

    loaded, name, may_import = read_recipe(recipe, changes or [], allow_code=allow_code)
    folder = out or fresh_folder(name)
    if seeds > 1:
        follow_seeds(loaded, folder, seeds, allow_code=may_import, as_json=as_json)
        return
    built = build(loaded, allow_code=may_import)
    follow(built, begun(loaded, folder), as_json=as_json)
