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
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe.

    Stopped by Ctrl-C it finishes the update, saves it, says how to continue, and ends with
    exit code 130; a second Ctrl-C stops at once.
    """
    from anybatch.cli.session import follow, fresh_folder
    from anybatch.recipe.build import build
    from anybatch.recipe.runs import begun, read_recipe

    loaded, name, may_import = read_recipe(recipe, changes or [], allow_code=allow_code)
    built = build(loaded, allow_code=may_import)
    follow(built, begun(loaded, out or fresh_folder(name)), as_json=as_json)
