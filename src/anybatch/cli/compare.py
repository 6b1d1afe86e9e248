"""anybatch compare RECIPE RECIPE ..."""

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli.options import AllowCode, Html, Json, Set, complete_recipe

__all__ = ["run"]


def run(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Two or more recipes, each a TOML file or the name of a shipped recipe.",
            autocompletion=complete_recipe,
        ),
    ],
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=2, help="Train each recipe from N seeds.")
    ] = 5,
    changes: Set = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", metavar="N", min=1, help="Train N runs at a time; default: as cores allow."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the runs.")
    ] = None,
    html: Html = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Compare recipes by training each from the same seeds.

    Runs train side by side with one thread each. Differences are taken within a seed, at equal
    numbers of examples and on the held-out data. --set changes a key of all recipes.

    After Ctrl-C the same command continues where it stopped.
    """
    from anybatch.advice.comparison import entries_of, open_folder, trials_of
    from anybatch.advice.pages import check_page
    from anybatch.cli.comparing import Call, conclude, make_runs
    from anybatch.errors import RecipeError
    from anybatch.recipe.runs import read_recipe

    if len(recipes) < 2:
        raise RecipeError(
            f"expected two recipes or more to compare, got {recipes[0]} alone. For its seeds by "
            f"themselves: anybatch train {recipes[0]} --seeds {seeds}"
        )
    check_page(html)
    entries = entries_of(
        read_recipe(name, changes or [], allow_code=allow_code) for name in recipes
    )
    call = Call(
        recipes=recipes,
        seeds=seeds,
        changes=changes or [],
        folder=open_folder(entries, out),
        html=html,
        allow_code=allow_code,
    )
    trials = trials_of(entries, call.folder, seeds)
    failed = make_runs(trials, jobs, call, quiet=as_json)
    conclude(trials, failed, call, as_json=as_json)
